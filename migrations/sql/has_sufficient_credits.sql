-- Whether the user could spend this many credits now, other requests' holds counted, and what the
-- organization may use beyond its prepaid credits.
CREATE OR REPLACE FUNCTION has_sufficient_credits(
    p_org_id uuid,
    p_user_id varchar,
    p_credits_needed bigint
) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT coalesce(
        (
            SELECT CASE
                WHEN remaining_credits - held_credits >= p_credits_needed THEN true
                ELSE remaining_credits - held_credits + overage_room(p_org_id) >= p_credits_needed
            END
            FROM user_credit_allocations
            WHERE org_id = p_org_id AND user_id = p_user_id AND is_active
        ),
        false
    )
$$;
