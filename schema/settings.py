"""All settings, read from `METERING_` environment variables."""

import os
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schema.errors import ConfigurationError

PREFIX: Final = "METERING_"
SERVICE_ROLE: Final = "metering_service"


class Environment(StrEnum):
    """Where this runs."""

    DEVELOPMENT = "development"
    PRODUCTION = "production"


class Settings(BaseSettings):
    """One field per `METERING_` variable; unknown variables are refused by `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    env: Environment = Environment.DEVELOPMENT
    database_url: SecretStr = SecretStr("")
    """PostgreSQL 15 or newer, as `postgresql://user@host:port/database`."""
    database_role: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$|^$")] = SERVICE_ROLE
    """Role that all processes act as, which cannot rewrite the books; empty keeps the login's."""
    redis_url: SecretStr = SecretStr("")
    """Redis 7.2 or Valkey 8 or newer, with append-only file and `noeviction`."""
    broker_url: SecretStr = SecretStr("")
    """Celery's broker; the same Redis unless set."""
    data_dir: Path = Path(".metering")
    """Where `metering up` keeps its servers' data and `stack.json`."""

    shards: Annotated[int, Field(ge=1, le=1024)] = 16
    """Usage streams. Every producer and worker must agree; let the queue run dry to change it."""
    drain_batch_events: Annotated[int, Field(ge=1, le=10_000)] = 1000
    """Most events that one transaction applies."""
    drain_slice_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How long a drain keeps its shard before it lets others have the worker."""
    drain_idle_seconds: Annotated[int, Field(ge=5, le=600)] = 30
    """After how long PostgreSQL ends the session of a drain that froze, freeing its shard."""
    outage_wait_seconds: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long a drain waits for PostgreSQL or Redis before the next wake-up takes over."""
    emit_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How long `emit` waits for Redis."""
    statement_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Longest single statement of the workers and of the API."""

    service_token: SecretStr = SecretStr("")
    """What services present as `Authorization: Bearer …` to the pre-check; empty refuses all."""

    @property
    def celery_broker_url(self) -> str:
        """The broker that Celery uses."""
        return self.broker_url.get_secret_value() or self.redis_url.get_secret_value()


def load_settings(**overrides: object) -> Settings:
    """The settings of this process.

    Raises:
        ConfigurationError: a variable is unknown or its value breaks a rule. Values are not shown.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name.upper() not in known:
            close = get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigurationError(f"unknown setting {name}{hint}")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{str(item['loc'][0]).upper()}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise ConfigurationError(problems) from None


def driver_url(url: str) -> str:
    """A PostgreSQL address in the words of SQLAlchemy, for psycopg.

    Raises:
        ConfigurationError: it is no PostgreSQL address.
    """
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return f"postgresql+psycopg://{url.removeprefix(scheme)}"
    raise ConfigurationError(f"{PREFIX}DATABASE_URL must start with postgresql://")
