-- What makes two reports of one request id the same request; `schema.events.fingerprint` computes
-- the same in Python. Stable, as `convert_to` is: called immutable it could not be inlined.
CREATE OR REPLACE FUNCTION usage_fingerprint(
    p_user_id varchar,
    p_service_type varchar,
    p_credits bigint
) RETURNS bytea
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT substring(
        sha256(convert_to(
            coalesce(p_credits::text, '') || ':'
                || coalesce(char_length(p_service_type)::text, '') || ':'
                || coalesce(p_service_type, '') || coalesce(p_user_id, ''),
            'UTF8'
        ))
        FROM 1 FOR 16
    )
$$;
