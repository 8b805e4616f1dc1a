"""All settings, read from `METERING_` environment variables."""

import os
import re
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from schema.errors import ConfigurationError

PREFIX: Final = "METERING_"
ORIGIN_PATTERN: Final = re.compile(
    r"https?://(\*\.)?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:(\d{1,5}|\*))?"
)
SERVICE_ROLE: Final = "metering_service"


class Environment(StrEnum):
    """Where this runs."""

    DEVELOPMENT = "development"
    PRODUCTION = "production"


class CreditPurchases(StrEnum):
    """Who may add credits to an organization's pool over HTTP."""

    ADMIN = "admin"
    SYSTEM = "system"


PerMinute = Annotated[int, Field(ge=1, le=100_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=1024**3)]
WebAddress = Annotated[str, Field(pattern=r"\A(https?://[^\s/?#]+[^\s?#]*)?\z")]


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
    """Longest single statement of the workers."""
    api_statement_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Longest single statement of the API, whose callers wait."""

    oidc_issuer: WebAddress = ""
    """Who issues sessions: the address of the Keycloak realm, as tokens say it in `iss`."""
    oidc_jwks_url: WebAddress = ""
    """Where the issuer's keys are; where Keycloak has them below the realm unless set."""
    oidc_audience: Annotated[str, Field(min_length=1)] = "loopnet-metering"
    """The client that sessions must be for, in `aud` or `azp`."""
    oidc_leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 30.0
    """How far the issuer's clock and ours may differ."""
    dev_issuer: bool = False
    """Whether the API has a login page without passwords; refused in production."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins of front ends, by commas; `https://*.example.com` is any subdomain."""
    credit_purchases: CreditPurchases = CreditPurchases.ADMIN
    """Who adds credits to a pool: admins of the organization, or only the system admin."""

    read_limit_per_minute: PerMinute = 100
    """Reads that one identity may send to the org-billing API."""
    write_limit_per_minute: PerMinute = 20
    """Writes that one identity may send to the org-billing API."""
    gate_limit_per_minute: PerMinute = 600_000
    """Pre-checks and releases of one identity."""
    ingest_limit_per_minute: PerMinute = 60_000
    """Requests with usage, of up to 1,000 events each, and direct charges of one identity."""
    ops_limit_per_minute: PerMinute = 600
    """Requests of one identity to the endpoints of operators, and for the state of a request."""

    body_limit_bytes: Bytes = 64 * 1024
    """Longest request body, but for usage events."""
    ingest_body_limit_bytes: Bytes = 16 * 1024 * 1024
    """Longest request body of usage events."""

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        items = (item.strip() for item in value.split(","))
        return [item for item in items if item]

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not ORIGIN_PATTERN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not like https://app.example.com or https://*.example.com"
                )
        return origins

    @model_validator(mode="after")
    def _fit_for_production(self) -> Self:
        if self.dev_issuer and self.env is Environment.PRODUCTION:
            raise ValueError("METERING_DEV_ISSUER lets anybody in: it cannot be set in production")
        return self

    @model_validator(mode="after")
    def _one_issuer(self) -> Self:
        if self.oidc_jwks_url and self.dev_issuer:
            raise ValueError(
                "METERING_DEV_ISSUER has keys of its own: unset METERING_OIDC_JWKS_URL"
            )
        if self.oidc_jwks_url and not self.oidc_issuer:
            raise ValueError("METERING_OIDC_JWKS_URL needs METERING_OIDC_ISSUER")
        return self

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
            ": ".join((*(PREFIX + str(name).upper() for name in item["loc"][:1]), item["msg"]))
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
