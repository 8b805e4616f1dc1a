-- The role that workers and the API act as: it reads and writes, and can neither change nor
-- delete what the append-only tables say. `METERING_DATABASE_ROLE` names it to the processes.
DO $$
BEGIN
    CREATE ROLE metering_service NOLOGIN;
EXCEPTION
    -- Roles belong to the whole server: another database's migration may have made it.
    WHEN duplicate_object OR unique_violation THEN NULL;
END
$$;

DO $$
BEGIN
    IF NOT pg_has_role(current_user, 'metering_service', 'MEMBER') THEN
        GRANT metering_service TO CURRENT_USER;
    END IF;
END
$$;

GRANT USAGE ON SCHEMA public TO metering_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO metering_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO metering_service;
REVOKE UPDATE, DELETE, TRUNCATE
    ON credit_usage_attribution, credit_transactions, org_billing_history
    FROM metering_service;
