"""`metering up` and the commands around it, as an operator meets them."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4
from zlib import crc32

import httpx
import psutil
import psycopg
import pytest
from redis import Redis

from ops.processes import leftovers
from ops.servers import free_port, wait_until
from ops.stackfile import StackFile
from tests.acceptance.conftest import (
    Metering,
    clean_environment,
    organization_document,
    run_metering,
    stack_process,
)

pytestmark = pytest.mark.acceptance

CHARGED_WITHIN_SECONDS = 3.0


@pytest.fixture
def org_id(metering: Metering, tmp_path: Path) -> UUID:
    document = tmp_path / "organization.json"
    document.write_text(organization_document(f"o-{uuid4().hex}", [("ana@x.example", 900)], 1000))
    created = metering("org", "create", "-f", str(document), "--json")
    assert created.code == 0, created.err
    return UUID(created.document["org_id"])


def state_of(stack: StackFile, org_id: UUID, request_id: str) -> str | None:
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute(
            "SELECT state FROM usage_requests WHERE org_id = %s AND request_id = %s",
            (org_id, request_id),
        ).fetchone()
    return row[0] if row else None


def test_stack_file_names_everything(stack: StackFile, home: Path) -> None:
    written = json.loads((home / ".metering" / "stack.json").read_text())
    assert set(written) == {
        "database_url", "redis_url", "broker_url", "api_url", "shards", "pids",
    }  # fmt: skip
    assert set(written["pids"]) == {"supervisor", "postgres", "valkey", "worker", "beat", "api"}
    assert all(psutil.pid_exists(pid) for pid in stack.pids.values())
    assert (home / ".metering" / "stack.json").stat().st_mode & 0o077 == 0


def test_foreign_entry_is_charged_in_time(stack: StackFile, org_id: UUID) -> None:
    event = {
        "request_id": "foreign-1",
        "org_id": str(org_id),
        "user_id": "ana@x.example",
        "service_type": "contact_lookup",
        "occurred_at": datetime.now(UTC).isoformat(),
    }
    with Redis.from_url(stack.redis_url) as client:
        shard = crc32(org_id.bytes) % stack.shards
        client.xadd(f"metering:usage:{shard}", {"event": json.dumps(event)})
    wait_until(
        lambda: state_of(stack, org_id, "foreign-1") == "charged",
        "the charge",
        CHARGED_WITHIN_SECONDS,
    )


def test_emit_waits_for_the_outcome(metering: Metering, org_id: UUID) -> None:
    flags = ("--org", str(org_id), "--user", "ana@x.example", "--wait", "20", "--json")
    charged = metering("emit", "--service", "valuation", "--request-id", "e1", *flags)
    assert charged.code == 0, charged.err
    assert charged.document["state"] == "charged"
    assert charged.document["credits"] == 75
    broke = metering("emit", "--service", "bulk_export", "--quantity", "900", *flags)
    assert broke.document["reason"] == "insufficient_credits"


def test_emit_names_the_bad_field(metering: Metering, org_id: UUID) -> None:
    done = metering(
        "emit", "--org", str(org_id), "--user", "ana@x.example", "--service", "valuation",
        "--quantity", "-1",
    )  # fmt: skip
    assert done.code == 2
    assert "quantity" in done.err


def test_status_sees_workers_and_queues(metering: Metering, stack: StackFile) -> None:
    found = metering("status", "--json").document
    assert len(found["shards"]) == stack.shards
    assert len(found["workers"]) == 1
    assert set(found["shards"][0]) == {"shard", "depth", "pending", "oldest_seconds"}


def test_reconcile_finds_drift(metering: Metering, stack: StackFile, org_id: UUID) -> None:
    assert metering("reconcile").code == 0
    spoil = "UPDATE organization_credit_pools SET used_credits = used_credits + %s"
    with psycopg.connect(stack.database_url) as connection:
        connection.execute(f"{spoil} WHERE org_id = %s", (5, org_id))
    try:
        found = metering("reconcile", "--json")
        assert found.code == 1
        assert [drift["check"] for drift in found.document["drifts"]] == ["pools.used"]
        assert str(org_id) in found.document["drifts"][0]["subject"]
    finally:
        with psycopg.connect(stack.database_url) as connection:
            connection.execute(f"{spoil} WHERE org_id = %s", (-5, org_id))


def test_gate_knows_the_service_token(stack: StackFile, home: Path, org_id: UUID) -> None:
    token = (home / ".metering" / "service.token").read_text()
    body = {"org_id": str(org_id), "user_id": "ana@x.example", "service_type": "valuation"}
    url = f"{stack.api_url}/api/v1/precheck"
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["credits"] == 75
    assert httpx.post(url, json=body).status_code == httpx.codes.UNAUTHORIZED


def test_a_service_token_that_was_revoked_stays_revoked(
    new_home: Path, empty_database_url: str, redis_url: str
) -> None:
    servers = {"METERING_DATABASE_URL": empty_database_url, "METERING_REDIS_URL": redis_url}
    with stack_process(new_home, **servers):
        token = (new_home / ".metering" / "service.token").read_text()
        assert answer_to(new_home, token) == httpx.codes.NOT_FOUND
        assert run_metering("token", "revoke", "metering-up", cwd=new_home).code == 0
    with stack_process(new_home, **servers):
        assert (new_home / ".metering" / "service.token").read_text() == token
        assert answer_to(new_home, token) == httpx.codes.UNAUTHORIZED
    told = " ".join((new_home / "up.log").read_text().split())
    assert "remove the file and start again" in told


def answer_to(home: Path, token: str) -> int:
    """401 if the API does not know the token: what it asks for is not there."""
    stack = StackFile.read(home / ".metering")
    assert stack is not None
    url = f"{stack.api_url}/api/v1/nowhere"
    return httpx.get(url, headers={"Authorization": f"Bearer {token}"}).status_code


def test_second_stack_on_the_directory_is_refused(home: Path, stack: StackFile) -> None:
    done = run_metering("up", "--port", "1", cwd=home)
    assert done.code == 2
    assert "already" in done.err
    assert str(stack.pids["supervisor"]) in done.err


def test_taken_port_is_named(stack: StackFile, new_home: Path) -> None:
    port = stack.api_url.rpartition(":")[2]
    done = run_metering("up", "--port", port, cwd=new_home)
    assert done.code == 2
    assert f"port {port} is taken" in done.err


def test_without_a_stack_commands_say_what_to_do(new_home: Path) -> None:
    done = run_metering("status", cwd=new_home)
    assert done.code == 2
    assert "metering up" in done.err


def test_foreign_data_directory_is_refused(new_home: Path) -> None:
    postgres = new_home / ".metering" / "postgres"
    postgres.mkdir(parents=True)
    (postgres / "PG_VERSION").write_text("9.6\n")
    done = run_metering("up", cwd=new_home)
    assert done.code == 2
    assert "made by PostgreSQL 9.6" in done.err


def test_ctrl_c_ends_everything(new_home: Path) -> None:
    with stack_process(new_home) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert leftovers(new_home / ".metering") == []
    assert not (new_home / ".metering" / "stack.json").exists()


def test_a_server_that_somebody_started_again_ends_with_the_stack(new_home: Path) -> None:
    with stack_process(new_home):
        stack = StackFile.read(new_home / ".metering")
        assert stack is not None
        server = psutil.Process(stack.pids["valkey"])
        program, directory = server.exe(), server.cwd()
        server.terminate()
        server.wait(30)
        configuration = str(Path(directory) / "valkey.conf")
        other = psutil.Popen([program, configuration], cwd=directory, start_new_session=True)
        assert other.is_running()
    assert other.wait(30) == 0
    assert leftovers(new_home / ".metering") == []


def test_servers_of_your_own_take_the_place_of_the_embedded_ones(
    new_home: Path, empty_database_url: str, redis_url: str
) -> None:
    with stack_process(
        new_home, METERING_DATABASE_URL=empty_database_url, METERING_REDIS_URL=redis_url
    ):
        stack = StackFile.read(new_home / ".metering")
        assert stack is not None
        assert stack.pids.keys() == {"supervisor", "worker", "beat", "api"}
        assert (stack.database_url, stack.redis_url) == (empty_database_url, redis_url)
        assert run_metering("reconcile", cwd=new_home).code == 0
    assert not (new_home / ".metering" / "postgres").exists()


def test_a_killed_stack_is_cleaned_up_by_the_next(new_home: Path) -> None:
    with stack_process(new_home) as process:
        process.kill()
        process.wait(60)
    names = {process.name() for process in leftovers(new_home / ".metering")}
    assert {"postgres", "valkey-server"} <= names
    with stack_process(new_home):
        assert "left behind" in (new_home / "up.log").read_text()
    assert leftovers(new_home / ".metering") == []


def test_a_stack_told_to_end_while_starting_ends(new_home: Path) -> None:
    command = [sys.executable, "-m", "ops.cli", "up", "--port", str(free_port())]
    process = subprocess.Popen(
        command, cwd=new_home, env=clean_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "starting postgres" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert leftovers(new_home / ".metering") == []
