-- Price an operation and set its credits aside, in one round trip. The allocation row alone is
-- locked: gates of different users do not wait for each other, nor for the organization's pool,
-- unless the organization allows overage. Then the user's own credits are set aside as far as
-- they go, and the rest is kept free of the organization's limit while the hold is open. The
-- outcome is `held`, or why not; placing the same hold again answers the first one.
CREATE OR REPLACE FUNCTION place_hold(
    p_org_id uuid,
    p_user_id varchar,
    p_service_type varchar,
    p_variant varchar,
    p_quantity numeric,
    p_credits bigint,
    p_request_id varchar,
    p_lasts interval,
    p_now timestamptz,
    OUT outcome text,
    OUT credits bigint,
    OUT available bigint,
    OUT expires_at timestamptz
)
LANGUAGE plpgsql
AS $$
DECLARE
    v_price numeric := price_of(p_service_type, p_variant, p_now);
    v_fingerprint bytea;
    v_allocation_id uuid;
    v_allows_overage boolean;
    v_own bigint;
    v_request usage_requests%ROWTYPE;
BEGIN
    credits := coalesce(ceil(v_price * p_quantity)::bigint, p_credits);
    IF credits IS NULL THEN
        outcome := 'unknown_service';
        RETURN;
    END IF;
    IF p_credits <> credits THEN
        outcome := 'price_mismatch';
        RETURN;
    END IF;
    v_fingerprint := usage_fingerprint(p_user_id, p_service_type, credits);

    PERFORM FROM organization_credit_pools
    WHERE org_id = p_org_id AND allow_overage
    FOR NO KEY UPDATE;
    v_allows_overage := FOUND;

    SELECT id, remaining_credits - held_credits INTO v_allocation_id, available
    FROM user_credit_allocations
    WHERE org_id = p_org_id AND user_id = p_user_id AND is_active
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM FROM organizations WHERE id = p_org_id;
        outcome := CASE WHEN FOUND THEN 'no_allocation' ELSE 'unknown_organization' END;
        RETURN;
    END IF;

    SELECT * INTO v_request
    FROM usage_requests
    WHERE org_id = p_org_id AND request_id = p_request_id;
    IF FOUND THEN
        IF v_request.state NOT IN ('held', 'released', 'expired')
            OR v_request.fingerprint <> v_fingerprint
        THEN
            outcome := 'conflict';
            RETURN;
        END IF;
        IF v_request.state = 'held' THEN
            outcome := 'held';
            available := available + v_request.held_credits;
            expires_at := v_request.hold_expires_at;
            RETURN;
        END IF;
    END IF;
    v_own := least(available, credits);
    IF v_own < credits
        AND NOT (
            v_allows_overage AND credits - v_own <= overage_room(p_org_id, p_request_id)
        )
    THEN
        outcome := 'insufficient_credits';
        RETURN;
    END IF;

    expires_at := p_now + p_lasts;
    INSERT INTO usage_requests AS r (
        org_id, request_id, user_id, service_type, fingerprint, state, credits,
        held_credits, hold_expires_at, occurred_at, created_at
    )
    VALUES (
        p_org_id, p_request_id, p_user_id, p_service_type, v_fingerprint, 'held',
        place_hold.credits, v_own, place_hold.expires_at, p_now, p_now
    )
    ON CONFLICT (org_id, request_id) DO UPDATE
    SET state = 'held',
        held_credits = excluded.held_credits,
        hold_expires_at = excluded.hold_expires_at,
        settled_at = NULL
    WHERE r.state IN ('released', 'expired') AND r.fingerprint = excluded.fingerprint;
    IF NOT FOUND THEN
        -- Another user's request took the id since we looked.
        outcome := 'conflict';
        expires_at := NULL;
        RETURN;
    END IF;

    UPDATE user_credit_allocations
    SET held_credits = held_credits + v_own
    WHERE id = v_allocation_id;
    outcome := 'held';
END
$$;
