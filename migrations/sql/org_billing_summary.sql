-- One row per organization: its live subscription, pool, members and allocations.
CREATE OR REPLACE VIEW org_billing_summary AS
SELECT
    o.id AS org_id,
    o.name AS org_name,
    o.display_name,
    o.status AS org_status,
    o.is_test,
    s.id AS subscription_id,
    s.subscription_plan,
    s.monthly_price,
    s.billing_cycle,
    s.status AS subscription_status,
    s.current_period_start,
    s.current_period_end,
    coalesce(p.total_credits, 0) AS total_credits,
    coalesce(p.allocated_credits, 0) AS allocated_credits,
    coalesce(p.used_credits, 0) AS used_credits,
    coalesce(p.available_credits, 0) AS available_credits,
    coalesce(p.lifetime_purchased_credits, 0) AS lifetime_purchased_credits,
    coalesce(p.lifetime_spent_amount, 0) AS lifetime_spent_amount,
    (SELECT count(*) FROM organization_members m WHERE m.org_id = o.id) AS member_count,
    (
        SELECT count(*) FROM user_credit_allocations a WHERE a.org_id = o.id AND a.is_active
    ) AS active_allocations
FROM organizations o
LEFT JOIN organization_subscriptions s
    ON s.org_id = o.id AND s.status IN ('active', 'trialing', 'past_due', 'paused')
LEFT JOIN organization_credit_pools p ON p.org_id = o.id;
