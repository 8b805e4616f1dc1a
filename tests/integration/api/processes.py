"""The API as a process of its own, started as `metering up` starts it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from ops.servers import LOOPBACK, free_port, wait_until
from ops.stack import pipeline_commands
from schema.settings import Settings

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class ApiProcess:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"


@contextmanager
def api_process(settings: Settings, log: Path, **others: object) -> Iterator[ApiProcess]:
    """A running process; `others` are settings in place of these."""
    port = free_port()
    changed = settings.model_copy(update=others)
    environment = {
        "METERING_DATABASE_URL": changed.database_url.get_secret_value(),
        "METERING_REDIS_URL": changed.redis_url.get_secret_value(),
        "METERING_OIDC_ISSUER": changed.oidc_issuer,
        "METERING_API_STATEMENT_TIMEOUT_SECONDS": str(changed.api_statement_timeout_seconds),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(pipeline_commands(1, port)["api"]),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        running = ApiProcess(process, port, log)
        wait_until(lambda: _is_up(running), "the API", 30)
        yield running
    finally:
        process.kill()
        process.wait()


def _is_up(running: ApiProcess) -> bool:
    assert running.process.poll() is None, running.log.read_text("utf-8")
    try:
        return httpx.get(f"{running.url}/livez", timeout=2).is_success
    except httpx.TransportError:
        return False
