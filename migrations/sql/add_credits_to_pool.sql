-- Put credits into an organization's pool, making the pool if there is none. With a purchase
-- amount (USD) it is a purchase and is written to the billing history, without one a grant.
CREATE OR REPLACE FUNCTION add_credits_to_pool(
    p_org_id uuid,
    p_credits_amount bigint,
    p_purchase_amount numeric DEFAULT 0
) RETURNS boolean
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM add_pool_credits(
        p_org_id, CASE WHEN p_purchase_amount > 0 THEN 'purchase' ELSE 'grant' END,
        p_credits_amount, p_purchase_amount, NULL, NULL, now()
    );
    RETURN true;
END
$$;
