-- Give a request's held credits back to its user; the outcome is the state of the request, or
-- null if there is none, or none of the user that is named. A request that is not held (any more)
-- is left as it is.
CREATE OR REPLACE FUNCTION release_hold(
    p_org_id uuid,
    p_request_id varchar,
    p_now timestamptz,
    p_user_id varchar DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
    v_request usage_requests%ROWTYPE;
BEGIN
    SELECT * INTO v_request
    FROM usage_requests
    WHERE org_id = p_org_id AND request_id = p_request_id
        AND (p_user_id IS NULL OR user_id = p_user_id);
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;

    -- Allocation before request, as everywhere; then look again at what is true under the lock.
    PERFORM FROM user_credit_allocations
    WHERE org_id = p_org_id AND user_id = v_request.user_id
    FOR NO KEY UPDATE;

    UPDATE usage_requests
    SET state = 'released', settled_at = p_now
    WHERE org_id = p_org_id AND request_id = p_request_id AND state = 'held'
    RETURNING * INTO v_request;
    IF FOUND THEN
        UPDATE user_credit_allocations
        SET held_credits = held_credits - v_request.held_credits
        WHERE org_id = p_org_id AND user_id = v_request.user_id;
        RETURN 'released';
    END IF;
    RETURN (
        SELECT state FROM usage_requests WHERE org_id = p_org_id AND request_id = p_request_id
    );
END
$$;
