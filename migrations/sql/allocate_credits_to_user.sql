-- Move available credits of the pool to a user; adds to an existing allocation.
CREATE OR REPLACE FUNCTION allocate_credits_to_user(
    p_org_id uuid,
    p_user_id varchar,
    p_credits_amount bigint,
    p_allocated_by varchar DEFAULT NULL
) RETURNS boolean
LANGUAGE plpgsql
AS $$
DECLARE
    v_available bigint;
    v_allocation_id uuid;
BEGIN
    IF p_credits_amount IS NULL OR p_credits_amount <= 0 THEN
        RAISE EXCEPTION 'Credits must be positive: %', coalesce(p_credits_amount::text, 'null');
    END IF;

    -- Pool before allocation, as everywhere.
    SELECT available_credits INTO v_available
    FROM organization_credit_pools
    WHERE org_id = p_org_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'No credit pool found for org %', p_org_id;
    END IF;
    IF v_available < p_credits_amount THEN
        RAISE EXCEPTION 'Insufficient credits in pool: % available, % needed',
            v_available, p_credits_amount;
    END IF;

    INSERT INTO user_credit_allocations AS a (
        org_id, user_id, allocated_credits, allocated_by, last_reset_date, next_reset_date
    )
    VALUES (
        p_org_id, p_user_id, p_credits_amount, p_allocated_by, now(), now() + interval '1 month'
    )
    ON CONFLICT (org_id, user_id) DO UPDATE
    SET allocated_credits = a.allocated_credits + excluded.allocated_credits,
        allocated_by = coalesce(excluded.allocated_by, a.allocated_by),
        is_active = true
    RETURNING a.id INTO v_allocation_id;

    UPDATE organization_credit_pools
    SET allocated_credits = allocated_credits + p_credits_amount
    WHERE org_id = p_org_id;

    INSERT INTO credit_transactions (org_id, user_id, allocation_id, kind, credits, actor)
    VALUES (
        p_org_id, p_user_id, v_allocation_id, 'allocation', p_credits_amount, p_allocated_by
    );
    RETURN true;
END
$$;
