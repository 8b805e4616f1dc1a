"""Settings: `METERING_` variables, their limits, and silence about secrets."""

import traceback
from pathlib import Path
from typing import Final

import pytest
from pydantic import ValidationError

from schema.errors import ConfigurationError
from schema.settings import PREFIX, Environment, Settings, load_settings

SECRETS: Final = {
    "database_url": "postgresql://metering:hunter2@db/metering",
    "redis_url": "redis://:hunter2@redis/0",
    "broker_url": "redis://:hunter2@broker/1",
}


def refused(**overrides: object) -> ConfigurationError:
    """The error that loading raises."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**overrides)
    return caught.value


def test_the_variables_of_the_environment_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_SHARDS", "4")
    monkeypatch.setenv("METERING_ENV", "production")
    monkeypatch.setenv("METERING_DATA_DIR", "somewhere")
    monkeypatch.setenv("METERING_REDIS_URL", SECRETS["redis_url"])
    settings = load_settings()
    assert (settings.shards, settings.env) == (4, Environment.PRODUCTION)
    assert settings.data_dir == Path("somewhere")
    assert settings.redis_url.get_secret_value() == SECRETS["redis_url"]


def test_an_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_SHARDS", "4")
    assert load_settings(shards=5).shards == 5


def test_without_variables_the_defaults_of_the_contract_hold() -> None:
    settings = load_settings()
    assert (settings.shards, settings.env) == (16, Environment.DEVELOPMENT)
    assert settings.database_url.get_secret_value() == ""


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("METERING_SHARD", "; did you mean METERING_SHARDS?"),
        ("METERING_DATABASE_URI", "; did you mean METERING_DATABASE_URL?"),
        ("METERING_shardz", "; did you mean METERING_SHARDS?"),
        ("METERING_XYZZY", ""),
    ],
)
def test_an_unknown_variable_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setenv(name, "hunter2")
    assert str(refused()) == f"unknown setting {name}{hint}"


def test_variables_of_others_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METER_SHARDS", "many")
    monkeypatch.setenv("XMETERING_SHARDS", "many")
    assert load_settings().shards == 16


def test_an_unknown_argument_is_refused() -> None:
    assert "METERING_SHARDZ" in str(refused(shardz=3))


@pytest.mark.parametrize(
    ("name", "low", "high", "step"),
    [
        ("shards", 1, 1024, 1),
        ("drain_batch_events", 1, 10_000, 1),
        ("drain_slice_seconds", 0.1, 60, 0.1),
        ("drain_idle_seconds", 5, 600, 1),
        ("outage_wait_seconds", 0, 60, 0.1),
        ("emit_timeout_seconds", 0.1, 60, 0.1),
        ("statement_timeout_seconds", 0.1, 600, 0.1),
    ],
)
def test_limits_are_kept_and_named(name: str, low: float, high: float, step: float) -> None:
    for allowed in (low, high):
        assert getattr(load_settings(**{name: allowed}), name) == allowed
    for beyond in (low - step, high + step):
        assert str(refused(**{name: beyond})).startswith(f"{PREFIX}{name.upper()}: ")


@pytest.mark.parametrize(
    ("name", "value"), [("shards", "hunter2"), ("env", "hunter2"), ("drain_slice_seconds", "nan")]
)
def test_a_bad_value_is_named_by_its_variable_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), value)
    error = refused()
    assert str(error).startswith(f"{PREFIX}{name.upper()}: ")
    assert "hunter2" not in "".join(traceback.format_exception(error))


def test_all_bad_values_are_named_at_once() -> None:
    message = str(refused(shards=0, drain_batch_events=0))
    assert "METERING_SHARDS: " in message
    assert "METERING_DRAIN_BATCH_EVENTS: " in message


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), SECRETS[name])
    settings = load_settings()
    assert getattr(settings, name).get_secret_value() == SECRETS[name]
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(dict(settings))]
    assert not any("hunter2" in text for text in shown)
    monkeypatch.setenv("METERING_SHARDS", "0")
    assert "hunter2" not in "".join(traceback.format_exception(refused()))


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_wrong_type_is_not_shown(name: str) -> None:
    error = refused(**{name: ["hunter2"]})
    assert "hunter2" not in "".join(traceback.format_exception(error))


def test_the_broker_is_the_same_redis_unless_set() -> None:
    redis_url, broker_url = SECRETS["redis_url"], SECRETS["broker_url"]
    assert load_settings(redis_url=redis_url).celery_broker_url == redis_url
    both = load_settings(redis_url=redis_url, broker_url=broker_url)
    assert both.celery_broker_url == broker_url


def test_settings_do_not_change_once_they_are_read() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.shards = 3  # type: ignore[misc]
    assert settings.shards == 16


def test_every_duration_carries_its_unit() -> None:
    measured = [name for name, field in Settings.model_fields.items() if field.annotation is float]
    assert measured
    assert [name for name in measured if not name.endswith("_seconds")] == []


def test_anybody_is_let_in_only_while_developing() -> None:
    assert load_settings(dev_issuer=True).dev_issuer
    assert "METERING_DEV_ISSUER" in str(refused(dev_issuer=True, env="production"))
    assert not load_settings(env="production").dev_issuer


def test_there_is_one_issuer_of_sessions() -> None:
    keys = {"oidc_jwks_url": "https://id.example/certs"}
    assert "unset METERING_OIDC_JWKS_URL" in str(
        refused(dev_issuer=True, oidc_issuer="https://id.example", **keys)
    )
    assert "needs METERING_OIDC_ISSUER" in str(refused(**keys))
    assert load_settings(oidc_issuer="https://id.example", **keys).oidc_jwks_url
    assert load_settings(oidc_issuer="https://id.example", dev_issuer=True).dev_issuer


@pytest.mark.parametrize("name", ["oidc_issuer", "oidc_jwks_url"])
@pytest.mark.parametrize(
    "value", ["id.example", "https://", "ftp://id.example", "https://id.example\n", " https://a.b",
              "https://id.example?x=1", "https://id.example#x", "https:///realms"],
)  # fmt: skip
def test_an_issuer_is_a_web_address(name: str, value: str) -> None:
    usual = {"oidc_issuer": "https://id.example/realms/x"}
    assert str(refused(**usual | {name: value})).startswith(f"{PREFIX}{name.upper()}: ")


def test_an_issuer_may_be_anywhere_on_the_web() -> None:
    for value in ("", "http://localhost:8080/realms/x", "https://id.example/auth/realms/x/"):
        assert load_settings(oidc_issuer=value).oidc_issuer == value


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", ()),
        ("https://a.example", ("https://a.example",)),
        ("https://a.example, https://*.b.example,", ("https://a.example", "https://*.b.example")),
    ],
)
def test_origins_come_by_commas_and_may_be_none(
    monkeypatch: pytest.MonkeyPatch, text: str, origins: tuple[str, ...]
) -> None:
    monkeypatch.setenv("METERING_CORS_ORIGINS", text)
    assert load_settings().cors_origins == origins


@pytest.mark.parametrize("text", ["*", "a.example", "https://a.example/", "https://a.*.example"])
def test_what_is_no_origin_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("METERING_CORS_ORIGINS", text)
    with pytest.raises(ConfigurationError, match="METERING_CORS_ORIGINS"):
        load_settings()
