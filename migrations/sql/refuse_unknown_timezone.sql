-- Trigger function: an organization's resets need a time zone that exists.
CREATE OR REPLACE FUNCTION refuse_unknown_timezone() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM FROM pg_timezone_names WHERE name = NEW.timezone;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'Unknown time zone: %', NEW.timezone USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER timezone_exists
BEFORE INSERT OR UPDATE OF timezone ON organizations
FOR EACH ROW WHEN (NEW.timezone <> 'UTC')
EXECUTE FUNCTION refuse_unknown_timezone();
