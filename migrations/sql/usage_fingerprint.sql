-- What makes two reports of one request id the same request; `schema.events.fingerprint` computes
-- the same in Python.
CREATE OR REPLACE FUNCTION usage_fingerprint(
    p_user_id varchar,
    p_service_type varchar,
    p_credits bigint
) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT substring(
        sha256(convert_to(
            concat(p_credits, ':', char_length(p_service_type), ':', p_service_type, p_user_id),
            'UTF8'
        ))
        FROM 1 FOR 16
    )
$$;
