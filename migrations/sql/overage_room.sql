-- Credits an organization may still use beyond its prepaid ones: its limit less what was used
-- since the last bill and less what open holds of other requests count on. None without a live
-- subscription, since nobody would be billed; negative after the limit was lowered. True under the
-- lock of the pool.
CREATE OR REPLACE FUNCTION overage_room(
    p_org_id uuid,
    p_request_id varchar DEFAULT NULL
) RETURNS bigint
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(
        (
            SELECT p.overage_limit - p.overage_credits - coalesce(
                (
                    SELECT sum(r.credits - r.held_credits)
                    FROM usage_requests r
                    WHERE r.org_id = p.org_id
                        AND r.state = 'held'
                        AND r.held_credits < r.credits
                        AND r.request_id IS DISTINCT FROM p_request_id
                ),
                0
            )
            FROM organization_credit_pools p
            WHERE p.org_id = p_org_id
                AND p.allow_overage
                AND EXISTS (
                    SELECT FROM organization_subscriptions s
                    WHERE s.org_id = p.org_id
                        AND s.status IN ('active', 'trialing', 'past_due', 'paused')
                )
        ),
        0
    )::bigint
$$;
