-- Who used how much in each organization during the last 30 days.
CREATE OR REPLACE VIEW top_credit_users_by_org AS
SELECT
    u.org_id,
    o.name AS org_name,
    u.user_id,
    sum(u.credits_used)::bigint AS total_credits,
    count(*) FILTER (WHERE u.corrects IS NULL) AS request_count,
    count(DISTINCT u.service_type) AS services_used,
    max(u.occurred_at) AS last_usage,
    rank() OVER (PARTITION BY u.org_id ORDER BY sum(u.credits_used) DESC) AS usage_rank
FROM credit_usage_attribution u
JOIN organizations o ON o.id = u.org_id
WHERE u.occurred_at >= now() - interval '30 days'
GROUP BY u.org_id, o.name, u.user_id;
