"""Alembic environment: online migrations under a lock, with short lock waits."""

from alembic import context
from sqlalchemy import Connection, NullPool, create_engine, text

from schema.settings import driver_url, load_settings
from schema.tables import metadata


def _run(connection: Connection) -> None:
    # One migrator at a time; readers and drains are never queued behind us for long.
    connection.execute(text("SELECT pg_advisory_lock(hashtext('metering.migrations'))"))
    connection.execute(text("SET lock_timeout = '5s'"))
    # Functions name tables and functions that later versions bring.
    connection.execute(text("SET check_function_bodies = off"))
    connection.commit()
    context.configure(connection=connection, target_metadata=metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


def _database_url() -> str:
    configured = context.config.get_main_option("sqlalchemy.url")
    url = configured or load_settings().database_url.get_secret_value()
    return driver_url(url)


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    engine = create_engine(_database_url(), poolclass=NullPool)
    with engine.connect() as opened:
        _run(opened)
