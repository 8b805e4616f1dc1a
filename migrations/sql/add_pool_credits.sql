-- Change the credits of an organization's pool, making the pool if there is none: one
-- transaction row of `p_kind`, and a row of the billing history where money moves.
-- Purchases and grants count as lifetime purchases. Credits are negative in adjustments only.
CREATE OR REPLACE FUNCTION add_pool_credits(
    p_org_id uuid,
    p_kind text,
    p_credits bigint,
    p_amount numeric,
    p_actor varchar,
    p_reason text,
    p_now timestamptz
) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    v_is_test boolean;
    v_available bigint;
    v_bought bigint := CASE WHEN p_kind IN ('purchase', 'grant') THEN p_credits ELSE 0 END;
BEGIN
    IF p_credits IS NULL OR p_credits = 0 OR (p_credits < 0 AND p_kind <> 'adjustment') THEN
        RAISE EXCEPTION 'Credits must be positive: %', coalesce(p_credits::text, 'null');
    END IF;
    IF p_amount IS NULL OR p_amount < 0 THEN
        RAISE EXCEPTION 'Purchase amount must not be negative: %',
            coalesce(p_amount::text, 'null');
    END IF;
    SELECT is_test INTO v_is_test FROM organizations WHERE id = p_org_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'No organization found: %', p_org_id;
    END IF;

    INSERT INTO organization_credit_pools (org_id) VALUES (p_org_id)
    ON CONFLICT (org_id) DO NOTHING;
    SELECT available_credits INTO v_available
    FROM organization_credit_pools
    WHERE org_id = p_org_id
    FOR NO KEY UPDATE;
    IF v_available + p_credits < 0 THEN
        RAISE EXCEPTION 'Insufficient credits in pool: % available, % needed',
            v_available, -p_credits;
    END IF;

    UPDATE organization_credit_pools
    SET total_credits = total_credits + p_credits,
        lifetime_purchased_credits = lifetime_purchased_credits + v_bought,
        lifetime_spent_amount = lifetime_spent_amount
            + CASE p_kind WHEN 'purchase' THEN p_amount WHEN 'refund' THEN -p_amount ELSE 0 END
    WHERE org_id = p_org_id;

    INSERT INTO credit_transactions (org_id, kind, credits, amount, actor, reason, created_at)
    VALUES (p_org_id, p_kind, p_credits, p_amount, p_actor, p_reason, p_now);

    IF NOT v_is_test AND p_kind IN ('purchase', 'refund') THEN
        INSERT INTO org_billing_history (
            org_id, event_type, amount, payment_status, paid_at, event_metadata, notes, created_at
        )
        VALUES (
            p_org_id,
            CASE p_kind WHEN 'purchase' THEN 'credit_purchase' ELSE 'credit_refund' END,
            p_amount, 'paid', p_now, jsonb_build_object('credits', p_credits), p_reason, p_now
        );
    END IF;
END
$$;
