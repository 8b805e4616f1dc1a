-- Why a user has no credits to spend in an organization: the outcome of `place_hold`.
CREATE OR REPLACE FUNCTION why_not_spend(
    p_org_id uuid,
    p_user_id varchar
) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT coalesce(
        (
            SELECT CASE
                WHEN m.user_id IS NULL THEN 'not_a_member'
                WHEN o.status <> 'active' THEN 'organization_inactive'
                ELSE 'no_allocation'
            END
            FROM organizations o
            LEFT JOIN organization_members m ON m.org_id = o.id AND m.user_id = p_user_id
            WHERE o.id = p_org_id
        ),
        'unknown_organization'
    )
$$;
