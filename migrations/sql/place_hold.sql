-- Price an operation and set its credits aside, in one round trip, for a member of an active
-- organization. The allocation row alone is locked: gates of different users do not wait for each
-- other, nor for the organization's pool, unless the organization allows overage. Then the user's
-- own credits are set aside as far as they go, and the rest is kept free of the organization's
-- limit while the hold is open. The outcome is `held`, or why not; placing the same hold again
-- answers the first one.
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
    v_cost numeric := ceil(price_of(p_service_type, p_variant, p_now) * p_quantity);
    v_fingerprint bytea;
    v_allocation_id uuid;
    v_allows_overage boolean;
    v_own bigint;
    v_suffices boolean;
    v_is_new boolean := false;
    v_request usage_requests%ROWTYPE;
BEGIN
    IF v_cost > 9007199254740992 THEN
        outcome := 'out_of_range';
        RETURN;
    END IF;
    credits := coalesce(v_cost::bigint, p_credits);
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

    SELECT a.id, a.remaining_credits - a.held_credits INTO v_allocation_id, available
    FROM user_credit_allocations a
    JOIN organization_members m ON m.org_id = a.org_id AND m.user_id = a.user_id
    JOIN organizations o ON o.id = a.org_id
    WHERE a.org_id = p_org_id AND a.user_id = p_user_id AND a.is_active AND o.status = 'active'
    FOR NO KEY UPDATE OF a;
    IF NOT FOUND THEN
        outcome := why_not_spend(p_org_id, p_user_id);
        RETURN;
    END IF;
    v_own := least(available, credits);
    v_suffices := v_own = credits
        OR (v_allows_overage AND credits - v_own <= overage_room(p_org_id, p_request_id));

    -- Nearly every request is new, so it is written before it is looked for.
    IF v_suffices THEN
        expires_at := p_now + p_lasts;
        INSERT INTO usage_requests (
            org_id, request_id, user_id, service_type, fingerprint, state, credits,
            held_credits, hold_expires_at, occurred_at, created_at
        )
        VALUES (
            p_org_id, p_request_id, p_user_id, p_service_type, v_fingerprint, 'held',
            place_hold.credits, v_own, place_hold.expires_at, p_now, p_now
        )
        ON CONFLICT (org_id, request_id) DO NOTHING;
        v_is_new := FOUND;
    END IF;

    IF NOT v_is_new THEN
        SELECT * INTO v_request
        FROM usage_requests
        WHERE org_id = p_org_id AND request_id = p_request_id;
        IF FOUND
            AND (
                v_request.state NOT IN ('held', 'released', 'expired')
                OR v_request.fingerprint <> v_fingerprint
            )
        THEN
            outcome := 'conflict';
            expires_at := NULL;
            RETURN;
        END IF;
        IF v_request.state = 'held' THEN
            outcome := 'held';
            available := available + v_request.held_credits;
            expires_at := v_request.hold_expires_at;
            RETURN;
        END IF;
        IF NOT v_suffices THEN
            outcome := 'insufficient_credits';
            RETURN;
        END IF;
        UPDATE usage_requests
        SET state = 'held',
            held_credits = v_own,
            hold_expires_at = place_hold.expires_at,
            settled_at = NULL
        WHERE org_id = p_org_id AND request_id = p_request_id AND state IN ('released', 'expired');
        IF NOT FOUND THEN
            -- A direct charge has met it since we looked.
            outcome := 'conflict';
            expires_at := NULL;
            RETURN;
        END IF;
    END IF;

    UPDATE user_credit_allocations
    SET held_credits = held_credits + v_own
    WHERE id = v_allocation_id;
    outcome := 'held';
END
$$;
