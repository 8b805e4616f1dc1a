-- Move available credits of the pool to a user. An existing allocation gets them for the period
-- that is running; what it recurs to stays.
CREATE OR REPLACE FUNCTION allocate_credits_to_user(
    p_org_id uuid,
    p_user_id varchar,
    p_credits_amount bigint,
    p_allocated_by varchar DEFAULT NULL
) RETURNS boolean
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM fund_allocation(
        p_org_id, p_user_id, p_credits_amount, false, NULL, NULL, p_allocated_by, NULL, now()
    );
    RETURN true;
END
$$;
