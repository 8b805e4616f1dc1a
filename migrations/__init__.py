"""Alembic environment and versions, with one file per public SQL function or view in `sql/`."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def _config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring a database to `revision`; one that is there already is left as it is."""
    command.upgrade(_config(database_url), revision)


def downgrade(database_url: str, revision: str = "base") -> None:
    """Take a database back to `revision`; its later tables and their rows are dropped."""
    command.downgrade(_config(database_url), revision)


def check(database_url: str) -> None:
    """Raise `alembic.util.CommandError` if tables and migrations disagree."""
    command.check(_config(database_url))
