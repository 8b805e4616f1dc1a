"""`python -m migrations upgrade`: bring the database of METERING_DATABASE_URL up to date.

For installations without the source tree, where Alembic's own command finds no `alembic.ini`.
Exits with 0 when done, 1 when it cannot be done, 2 when the command or a setting is wrong.
"""

import argparse
import logging
from collections.abc import Callable, Sequence

from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

import migrations
from schema.errors import ConfigurationError
from schema.logs import configure_logs
from schema.settings import load_settings

log = logging.getLogger("migrations")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and say on standard error what it did."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    configure_logs()
    try:
        _run(chosen)
    except ConfigurationError as error:
        parser.error(error.message)
    except (CommandError, DBAPIError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    log.info("%s done", chosen.command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m migrations", description="Migrate the ledger.")
    commands = parser.add_subparsers(dest="command", required=True)
    upgrade = commands.add_parser("upgrade", help="migrate forward; the default is all the way")
    upgrade.add_argument("revision", nargs="?", default="head")
    downgrade = commands.add_parser("downgrade", help="migrate back; later tables lose their rows")
    downgrade.add_argument("revision", help="where to stop; 'base' drops everything")
    commands.add_parser("check", help="fail if tables and migrations disagree")
    return parser


def _run(chosen: argparse.Namespace) -> None:
    url = load_settings().database_url.get_secret_value()
    if not url:
        raise ConfigurationError("no database: set METERING_DATABASE_URL")
    if chosen.command == "check":
        migrations.check(url)
        return
    act: Callable[[str, str], None] = getattr(migrations, chosen.command)
    act(url, chosen.revision)


if __name__ == "__main__":
    main()
