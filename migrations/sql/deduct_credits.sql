-- Charge one request, once. With `p_request_id` a repetition has no effect, and an event of the
-- same request id that came through the queue counts as the same request.
CREATE OR REPLACE FUNCTION deduct_credits(
    p_org_id uuid,
    p_user_id varchar,
    p_credits_used bigint,
    p_service_type varchar,
    p_service_name varchar DEFAULT NULL,
    p_request_id varchar DEFAULT NULL,
    p_request_metadata jsonb DEFAULT NULL
) RETURNS boolean
LANGUAGE plpgsql
AS $$
DECLARE
    v_request_id varchar := coalesce(p_request_id, 'sql:' || gen_random_uuid());
    v_fingerprint bytea := usage_fingerprint(p_user_id, p_service_type, p_credits_used);
    v_request usage_requests%ROWTYPE;
    v_allocation user_credit_allocations%ROWTYPE;
    v_available bigint;
    v_held bigint;
    v_overage bigint;
BEGIN
    IF p_credits_used IS NULL OR p_credits_used <= 0 THEN
        RAISE EXCEPTION 'Credits must be positive: %', coalesce(p_credits_used::text, 'null');
    END IF;
    IF v_request_id !~ '^[A-Za-z0-9_.:-]{1,255}$' THEN
        RAISE EXCEPTION 'Invalid request id: 1 to 255 of A-Z a-z 0-9 . _ : - are allowed';
    END IF;

    -- The pool row is the organization's mutex and always comes first: drains lock in this order.
    PERFORM FROM organization_credit_pools WHERE org_id = p_org_id FOR NO KEY UPDATE;

    SELECT * INTO v_request
    FROM usage_requests
    WHERE org_id = p_org_id AND request_id = v_request_id;
    IF FOUND THEN
        IF v_request.state IN ('held', 'released', 'expired') THEN
            -- A hold is an estimate: user and service make it the same request, not the credits.
            IF (v_request.user_id, v_request.service_type) <> (p_user_id, p_service_type) THEN
                RAISE EXCEPTION 'Request id conflict: % was used for another request',
                    v_request_id;
            END IF;
        ELSIF v_request.fingerprint <> v_fingerprint THEN
            RAISE EXCEPTION 'Request id conflict: % was used for another request', v_request_id;
        ELSIF v_request.state = 'charged' THEN
            RETURN true;
        ELSIF v_request.state = 'discarded'
            OR v_request.reason NOT IN ('insufficient_credits', 'no_allocation')
        THEN
            RAISE EXCEPTION 'Request % is %: %', v_request_id, v_request.state, v_request.reason;
        END IF;
    END IF;

    SELECT * INTO v_allocation
    FROM user_credit_allocations
    WHERE org_id = p_org_id AND user_id = p_user_id
    FOR NO KEY UPDATE;
    -- Gates change holds under the lock of the allocation, so the request is read again.
    SELECT held_credits INTO v_held
    FROM usage_requests
    WHERE org_id = p_org_id AND request_id = v_request_id AND state = 'held';
    v_held := coalesce(v_held, 0);
    -- What was granted before an allocation was switched off may still be charged to it.
    IF v_allocation.id IS NULL OR NOT (v_allocation.is_active OR v_held > 0) THEN
        RAISE EXCEPTION 'No credit allocation found for user % in org %', p_user_id, p_org_id;
    END IF;
    v_available := v_allocation.remaining_credits - v_allocation.held_credits + v_held;
    v_overage := greatest(0, p_credits_used - v_available);
    IF v_overage > 0 THEN
        IF NOT v_allocation.is_active OR v_overage > overage_room(p_org_id, v_request_id) THEN
            RAISE EXCEPTION 'Insufficient credits: % available, % needed',
                v_available, p_credits_used;
        END IF;
        PERFORM lend_overage(
            p_org_id, p_user_id, v_allocation.id, v_overage, v_request_id, now()
        );
    END IF;

    UPDATE user_credit_allocations
    SET used_credits = used_credits + p_credits_used,
        held_credits = held_credits - v_held
    WHERE id = v_allocation.id;

    UPDATE organization_credit_pools
    SET used_credits = used_credits + p_credits_used
    WHERE org_id = p_org_id;

    INSERT INTO credit_usage_attribution (
        org_id, user_id, allocation_id, period_start, credits_used, overage_credits,
        service_type, service_name, request_id, request_metadata, source
    )
    VALUES (
        p_org_id, p_user_id, v_allocation.id, v_allocation.last_reset_date, p_credits_used,
        v_overage, p_service_type, p_service_name, v_request_id,
        coalesce(p_request_metadata, '{}'), 'sql'
    );

    INSERT INTO usage_requests AS r (
        org_id, request_id, user_id, service_type, fingerprint, state, credits,
        occurred_at, settled_at
    )
    VALUES (
        p_org_id, v_request_id, p_user_id, p_service_type, v_fingerprint, 'charged',
        p_credits_used, now(), now()
    )
    ON CONFLICT (org_id, request_id) DO UPDATE
    SET state = 'charged',
        credits = excluded.credits,
        fingerprint = excluded.fingerprint,
        occurred_at = excluded.occurred_at,
        reason = NULL,
        settled_at = now()
    WHERE r.user_id = excluded.user_id AND r.service_type = excluded.service_type;
    IF NOT FOUND THEN
        -- The gate has given the id to another request since we looked: it takes no lock of ours.
        RAISE EXCEPTION 'Request id conflict: % was used for another request', v_request_id;
    END IF;

    UPDATE dead_letters
    SET state = 'charged', resolved_at = now()
    WHERE org_id = p_org_id AND request_id = v_request_id AND fingerprint = v_fingerprint
        AND state = 'open';
    RETURN true;
END
$$;
