-- Give an allocation credits on account: they enter the pool as overage, to be billed, and go to
-- the user at once. The caller holds the locks of pool and allocation and has asked for the room.
CREATE OR REPLACE FUNCTION lend_overage(
    p_org_id uuid,
    p_user_id varchar,
    p_allocation_id uuid,
    p_credits bigint,
    p_request_id varchar,
    p_now timestamptz
) RETURNS void
LANGUAGE sql
AS $$
    UPDATE organization_credit_pools
    SET total_credits = total_credits + p_credits,
        allocated_credits = allocated_credits + p_credits,
        overage_credits = overage_credits + p_credits
    WHERE org_id = p_org_id;

    UPDATE user_credit_allocations
    SET allocated_credits = allocated_credits + p_credits
    WHERE id = p_allocation_id;

    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, reason, request_id, created_at
    )
    VALUES
        (p_org_id, NULL, NULL, 'overage', p_credits, 'overage', p_request_id, p_now),
        (
            p_org_id, p_user_id, p_allocation_id, 'allocation', p_credits, 'overage',
            p_request_id, p_now
        )
$$;
