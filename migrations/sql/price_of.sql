-- Credits per unit of a service at a time, or null; `schema.prices.PriceBook` says the same in
-- Python. A row without variant serves every variant; without a variant the first row counts.
CREATE OR REPLACE FUNCTION price_of(
    p_service_type varchar,
    p_variant varchar,
    p_at timestamptz
) RETURNS numeric
LANGUAGE plpgsql STABLE PARALLEL SAFE
AS $$
BEGIN
    -- In plpgsql, since its plan is kept: a function in SQL with a subquery is planned every time.
    RETURN (
        SELECT credits
        FROM service_prices
        WHERE service_type = p_service_type
            AND (p_variant IS NULL OR variant IS NULL OR variant = p_variant)
            AND effective_from <= p_at
        ORDER BY
            CASE WHEN p_variant IS NULL THEN position END,
            variant IS NULL,
            effective_from DESC
        LIMIT 1
    );
END
$$;
