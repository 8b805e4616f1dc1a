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


def test_a_version_back_the_gate_still_answers(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url)
    migrations.downgrade(empty_database_url, "0007")
    with psycopg.connect(empty_database_url) as connection:
        answer = connection.execute(
            """
            SELECT outcome
            FROM place_hold(gen_random_uuid(), 'ada', 'llm', NULL, 1, NULL, 'r-1', '1 min', now())
            """
        ).fetchone()
    assert answer == ("unknown_organization",)
    migrations.upgrade(empty_database_url)


def test_tables_and_migrations_agree(database_url: str) -> None:
    migrations.check(database_url)
