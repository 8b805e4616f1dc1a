-- Put credits into an organization's pool, making the pool if there is none. With a purchase
-- amount (USD) it is a purchase and is written to the billing history, without one a grant.
CREATE OR REPLACE FUNCTION add_credits_to_pool(
    p_org_id uuid,
    p_credits_amount bigint,
    p_purchase_amount numeric DEFAULT 0
) RETURNS boolean
LANGUAGE plpgsql
AS $$
DECLARE
    v_is_test boolean;
BEGIN
    IF p_credits_amount IS NULL OR p_credits_amount <= 0 THEN
        RAISE EXCEPTION 'Credits must be positive: %', coalesce(p_credits_amount::text, 'null');
    END IF;
    IF p_purchase_amount IS NULL OR p_purchase_amount < 0 THEN
        RAISE EXCEPTION 'Purchase amount must not be negative: %',
            coalesce(p_purchase_amount::text, 'null');
    END IF;
    SELECT is_test INTO v_is_test FROM organizations WHERE id = p_org_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'No organization found: %', p_org_id;
    END IF;

    INSERT INTO organization_credit_pools AS p (
        org_id, total_credits, lifetime_purchased_credits, lifetime_spent_amount
    )
    VALUES (p_org_id, p_credits_amount, p_credits_amount, p_purchase_amount)
    ON CONFLICT (org_id) DO UPDATE
    SET total_credits = p.total_credits + excluded.total_credits,
        lifetime_purchased_credits =
            p.lifetime_purchased_credits + excluded.lifetime_purchased_credits,
        lifetime_spent_amount = p.lifetime_spent_amount + excluded.lifetime_spent_amount;

    INSERT INTO credit_transactions (org_id, kind, credits, amount)
    VALUES (
        p_org_id,
        CASE WHEN p_purchase_amount > 0 THEN 'purchase' ELSE 'grant' END,
        p_credits_amount,
        p_purchase_amount
    );

    IF p_purchase_amount > 0 AND NOT v_is_test THEN
        INSERT INTO org_billing_history (
            org_id, event_type, amount, payment_status, paid_at, event_metadata
        )
        VALUES (
            p_org_id, 'credit_purchase', p_purchase_amount, 'paid', now(),
            jsonb_build_object('credits', p_credits_amount)
        );
    END IF;
    RETURN true;
END
$$;
