-- When the first period of an allocation ends, or null if it never does. Wall-clock time of the
-- organization is kept; `schema.periods` computes the same and all later ends in Python.
CREATE OR REPLACE FUNCTION period_end(
    p_org_id uuid,
    p_reset_period text,
    p_anchor timestamptz
) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT (
        (p_anchor AT TIME ZONE timezone)
        + CASE p_reset_period
            WHEN 'daily' THEN interval '1 day'
            WHEN 'weekly' THEN interval '7 days'
            WHEN 'monthly' THEN interval '1 month'
        END
    ) AT TIME ZONE timezone
    FROM organizations
    WHERE id = p_org_id
$$;
