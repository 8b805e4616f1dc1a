"""The connection to PostgreSQL: who opens transactions, and what an outage looks like."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import psycopg
from sqlalchemy import Connection, CursorResult, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from schema.errors import ConfigurationError, LedgerUnavailable
from schema.settings import SERVICE_ROLE, Settings, driver_url

APPLICATION_NAME: Final = "metering"
CONNECT_TIMEOUT_SECONDS: Final = 5
_AWAY: Final = (
    OperationalError
    | InterfaceError
    | PoolTimeout
    | psycopg.OperationalError
    | psycopg.InterfaceError
)

_NOT_MIGRATED: Final = ("42P01", "42703", "42883")
"""Undefined table, column, function."""

Rows = CursorResult[*tuple[Any, ...]]


def run(connection: Connection, sql: LiteralString, **parameters: object) -> Rows:
    """Execute one statement written for psycopg; parameters as `%(name)s`, or `%(name)b` binary."""
    return connection.exec_driver_sql(sql, parameters)


def copy(
    connection: Connection,
    sql: LiteralString,
    types: Sequence[str],
    rows: Iterable[Sequence[object]],
) -> None:
    """Stream rows into a table with one binary `COPY … FROM STDIN`; `types` name each column's."""
    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
    with driver.cursor() as cursor, cursor.copy(sql) as stream:
        stream.set_types(types)
        for row in rows:
            stream.write_row(row)


def is_outage(error: BaseException) -> bool:
    """Whether an error means that PostgreSQL is away, busy or being restarted.

    The same call may succeed later; nothing is wrong with what was asked.
    """
    return isinstance(error, LedgerUnavailable | _AWAY) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


@contextmanager
def outages_named() -> Iterator[None]:
    """Turn the driver's many ways to say "away" into `LedgerUnavailable`."""
    try:
        yield
    except (DBAPIError, psycopg.Error, PoolTimeout) as error:
        if f'role "{SERVICE_ROLE}" does not exist' in str(error):
            raise _not_migrated(error) from error
        if is_outage(error):
            raise LedgerUnavailable(f"PostgreSQL does not answer: {_cause(error)}") from error
        if sqlstate(error) in _NOT_MIGRATED:
            raise _not_migrated(error) from error
        raise


def _not_migrated(error: Exception) -> LedgerUnavailable:
    return LedgerUnavailable(
        "the database is not as this version needs it; 'python -m migrations upgrade' "
        f"brings it there ({_cause(error)})"
    )


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's five-character code of an error, if it is one of PostgreSQL's."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause.sqlstate if isinstance(cause, psycopg.Error) else None


def _cause(error: Exception) -> str:
    text = str(error.orig if isinstance(error, DBAPIError) else error)
    return text.partition("\n")[0].strip()


def connection_options(
    *, application_name: str, statement_timeout_seconds: float, role: str
) -> dict[str, Any]:
    """How every connection to the ledger is opened, in the words of libpq."""
    return {
        "application_name": application_name,
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "options": f"-c statement_timeout={int(statement_timeout_seconds * 1000)}"
        " -c timezone=UTC" + (f" -c role={role}" if role else ""),
    }


class Database:
    """A pool of connections to one PostgreSQL database.

    Every public function of this room opens exactly one transaction with `transaction` or
    `snapshot`; nothing else commits.
    """

    def __init__(
        self,
        url: str,
        *,
        statement_timeout_seconds: float = 30.0,
        pool_size: int = 5,
        pool_timeout_seconds: float = 30.0,
        application_name: str = APPLICATION_NAME,
        role: str = SERVICE_ROLE,
    ) -> None:
        if not url:
            raise ConfigurationError(
                "no database: set METERING_DATABASE_URL, or start one with 'metering up'"
            )
        self._engine = create_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=pool_timeout_seconds,
            pool_pre_ping=True,
            connect_args=connection_options(
                application_name=application_name,
                statement_timeout_seconds=statement_timeout_seconds,
                role=role,
            ),
        )

    @classmethod
    def of(cls, settings: Settings, **options: Any) -> "Database":  # noqa: ANN401
        """The database that the settings name."""
        usual: dict[str, Any] = {
            "statement_timeout_seconds": settings.statement_timeout_seconds,
            "role": settings.database_role,
        }
        return cls(settings.database_url.get_secret_value(), **(usual | options))

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """One connection for several transactions in a row, each begun by its ledger function."""
        with outages_named(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that commits at the end, or rolls back on any error."""
        with outages_named(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A read-only view of one moment, however long it takes to read."""
        with outages_named(), self._engine.connect() as connection:
            connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close the idle connections."""
        self._engine.dispose()
