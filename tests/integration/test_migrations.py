"""The migrations build what the tables say, and take it away again."""

import psycopg

import migrations


def public_objects(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            """
            SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
            UNION
            SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
            """
        )
        return {name for (name,) in rows} - {"alembic_version", "alembic_version_pkc"}


def test_up_down_and_up_again(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url)
    built = public_objects(empty_database_url)
    assert {"usage_requests", "deduct_credits", "org_billing_summary"} <= built
    migrations.downgrade(empty_database_url)
    assert public_objects(empty_database_url) == set()
    migrations.upgrade(empty_database_url)
    assert public_objects(empty_database_url) == built


def test_tables_and_migrations_agree(database_url: str) -> None:
    migrations.check(database_url)
