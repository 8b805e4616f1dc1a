-- Move available credits of the pool to a user. A new allocation, or one that was switched off,
-- recurs to what it is given; an existing one is topped up for its period only, unless the
-- allowance is raised with it. Returns the allocation.
CREATE OR REPLACE FUNCTION fund_allocation(
    p_org_id uuid,
    p_user_id varchar,
    p_credits bigint,
    p_raise_allowance boolean,
    p_reset_period text,
    p_notes text,
    p_actor varchar,
    p_reason text,
    p_now timestamptz
) RETURNS uuid
LANGUAGE plpgsql
AS $$
DECLARE
    v_available bigint;
    v_allocation user_credit_allocations%ROWTYPE;
    v_period text;
BEGIN
    IF p_credits IS NULL OR p_credits <= 0 THEN
        RAISE EXCEPTION 'Credits must be positive: %', coalesce(p_credits::text, 'null');
    END IF;

    -- Pool before allocation, as everywhere.
    SELECT available_credits INTO v_available
    FROM organization_credit_pools
    WHERE org_id = p_org_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'No credit pool found for org %', p_org_id;
    END IF;
    IF v_available < p_credits THEN
        RAISE EXCEPTION 'Insufficient credits in pool: % available, % needed',
            v_available, p_credits;
    END IF;

    SELECT * INTO v_allocation
    FROM user_credit_allocations
    WHERE org_id = p_org_id AND user_id = p_user_id
    FOR NO KEY UPDATE;
    IF FOUND THEN
        v_period := coalesce(p_reset_period, v_allocation.reset_period);
        UPDATE user_credit_allocations
        SET allocated_credits = allocated_credits + p_credits,
            allowance_credits = CASE
                WHEN NOT is_active THEN p_credits
                WHEN p_raise_allowance THEN allowance_credits + p_credits
                ELSE allowance_credits
            END,
            reset_period = v_period,
            -- Another rhythm begins with the period that is running.
            reset_anchor = CASE
                WHEN v_period = reset_period THEN reset_anchor ELSE last_reset_date
            END,
            next_reset_date = CASE
                WHEN v_period = reset_period THEN next_reset_date
                ELSE period_end(p_org_id, v_period, last_reset_date)
            END,
            allocated_by = coalesce(p_actor, allocated_by),
            notes = coalesce(p_notes, notes),
            is_active = true
        WHERE id = v_allocation.id;
    ELSE
        v_period := coalesce(p_reset_period, 'monthly');
        INSERT INTO user_credit_allocations (
            org_id, user_id, allocated_credits, allowance_credits, allocated_by, notes,
            reset_period, reset_anchor, last_reset_date, next_reset_date, created_at
        )
        VALUES (
            p_org_id, p_user_id, p_credits, p_credits, p_actor, p_notes,
            v_period, p_now, p_now, period_end(p_org_id, v_period, p_now), p_now
        )
        RETURNING * INTO v_allocation;
    END IF;

    UPDATE organization_credit_pools
    SET allocated_credits = allocated_credits + p_credits
    WHERE org_id = p_org_id;

    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, actor, reason, created_at
    )
    VALUES (
        p_org_id, p_user_id, v_allocation.id, 'allocation', p_credits, p_actor, p_reason, p_now
    );
    RETURN v_allocation.id;
END
$$;
