-- What each organization used and cost during the last 30 days; cost and markup in USD.
CREATE OR REPLACE VIEW org_billing_metrics AS
SELECT
    o.id AS org_id,
    o.name AS org_name,
    coalesce(sum(u.credits_used), 0)::bigint AS total_credits_used,
    count(u.id) FILTER (WHERE u.corrects IS NULL) AS total_requests,
    count(DISTINCT u.user_id) AS active_users,
    count(DISTINCT u.service_type) AS services_used,
    coalesce(sum(u.api_cost), 0) AS total_api_cost,
    coalesce(sum(u.markup_applied), 0) AS total_markup,
    coalesce(sum(u.total_cost), 0) AS total_cost,
    round(
        coalesce(sum(u.credits_used) / nullif(count(u.id) FILTER (WHERE u.corrects IS NULL), 0), 0),
        2
    ) AS average_credits_per_request,
    max(u.occurred_at) AS last_usage
FROM organizations o
LEFT JOIN credit_usage_attribution u
    ON u.org_id = o.id AND u.occurred_at >= now() - interval '30 days'
GROUP BY o.id, o.name;
