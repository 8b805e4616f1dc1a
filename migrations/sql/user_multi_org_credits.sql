-- One row per user and organization: role and credits.
CREATE OR REPLACE VIEW user_multi_org_credits AS
SELECT
    coalesce(m.user_id, a.user_id) AS user_id,
    o.id AS org_id,
    o.name AS org_name,
    o.display_name AS org_display_name,
    m.role,
    m.email AS user_email,
    s.subscription_plan,
    s.monthly_price,
    coalesce(a.allocated_credits, 0) AS allocated_credits,
    coalesce(a.used_credits, 0) AS used_credits,
    coalesce(a.remaining_credits, 0) AS remaining_credits,
    coalesce(a.held_credits, 0) AS held_credits,
    a.reset_period,
    a.next_reset_date,
    coalesce(a.is_active, false) AS is_active
FROM organization_members m
FULL JOIN user_credit_allocations a ON a.org_id = m.org_id AND a.user_id = m.user_id
JOIN organizations o ON o.id = coalesce(m.org_id, a.org_id)
LEFT JOIN organization_subscriptions s
    ON s.org_id = o.id AND s.status IN ('active', 'trialing', 'past_due', 'paused');
