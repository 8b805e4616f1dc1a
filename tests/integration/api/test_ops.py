"""The endpoints of operators: what they show is what is there, and only operators see it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from redis import Redis

from api.app import create_app
from ledger import holds, runs
from ledger.clock import utc_now
from ledger.database import Database
from ledger.gate import Operation
from ledger.reconcile import reconcile
from ops.servers import free_port
from schema.scopes import Scope
from schema.settings import Settings
from schema.wire import CONSUMER, EVENT_FIELD, GROUP, TASK_RESET_DUE, stream_name
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.api.streams import empty_streams
from tests.integration.ledger.world import World, entry, event, fields_of

BASE = "/api/v1/ops"
READS = [
    "/queues",
    "/dead-letters",
    "/dead-letters/summary",
    "/dead-letters/1",
    "/holds",
    "/resets",
    "/resets/preview",
    "/reconcile",
]
ACTS = ["/resets/run", "/reconcile"]
DAY = timedelta(days=1)


@pytest.fixture
def reader(callers: Callers) -> Headers:
    return callers.service(Scope.OPS_READ)


@pytest.fixture
def writer(callers: Callers) -> Headers:
    return callers.service(Scope.OPS_WRITE)


@pytest.fixture
def queue(api_settings: Settings) -> Iterator[Redis]:
    """The usage streams of the API, empty."""
    with empty_streams(api_settings) as client:
        yield client


def read(api: httpx.Client, headers: Headers, path: str, **query: Any) -> Any:
    answer = api.get(BASE + path, headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["detail"]["error"]


@pytest.mark.parametrize("path", READS)
def test_who_may_read(api: httpx.Client, callers: Callers, api_world: World, path: str) -> None:
    org_id = api_world.organization(members={"ada": "admin"})
    query = {"org_id": str(org_id)}
    allowed = {200, 404}
    assert api.get(BASE + path).status_code == 401
    assert refusal(api.get(BASE + path, headers=callers.user("ada"), params=query)) == (
        403,
        "forbidden",
    )
    assert api.get(BASE + path, headers=callers.system_admin()).status_code in allowed
    for scope in Scope:
        status = api.get(BASE + path, headers=callers.service(scope)).status_code
        assert (status in allowed) == (scope is Scope.OPS_READ), scope
        assert status in {*allowed, 403}


@pytest.mark.parametrize("path", ACTS)
def test_who_may_act(api: httpx.Client, callers: Callers, path: str) -> None:
    assert api.post(BASE + path).status_code == 401
    assert refusal(api.post(BASE + path, headers=callers.user("ada"))) == (403, "forbidden")
    assert api.post(BASE + path, headers=callers.system_admin()).status_code == 200
    for scope in Scope:
        status = api.post(BASE + path, headers=callers.service(scope)).status_code
        assert status == (200 if scope is Scope.OPS_WRITE else 403), scope


def test_queues_show_what_waits(
    api: httpx.Client, reader: Headers, queue: Redis, api_settings: Settings
) -> None:
    empty = read(api, reader, "/queues")
    assert (empty["depth"], empty["pending"], empty["oldest_seconds"]) == (0, 0, None)
    assert [shard["shard"] for shard in empty["shards"]] == list(range(api_settings.shards))
    for shard in (0, 0, 3):
        queue.xadd(stream_name(shard), {EVENT_FIELD: "{}"})
    queue.xgroup_create(stream_name(0), GROUP, id="0")
    queue.xreadgroup(GROUP, CONSUMER, {stream_name(0): ">"}, count=1)
    found = read(api, reader, "/queues")
    assert (found["depth"], found["pending"]) == (3, 1)
    assert 0 <= found["oldest_seconds"] < 30
    shard = found["shards"][0]
    assert (shard["depth"], shard["pending"]) == (2, 1)
    assert found["shards"][3]["depth"] == 1
    assert found["shards"][1]["oldest_seconds"] is None


def test_queues_are_unavailable_without_redis(api_settings: Settings, reader: Headers) -> None:
    address = SecretStr(f"redis://127.0.0.1:{free_port()}")
    with serving(create_app(api_settings.model_copy(update={"redis_url": address}))) as api:
        answer = api.get(BASE + "/queues", headers=reader)
    assert refusal(answer) == (503, "unavailable")
    assert "127.0.0.1" not in answer.text


@pytest.fixture
def letters(api_world: World) -> UUID:
    """An organization with three dead letters; the first is of yesterday."""
    org_id = api_world.organization(pool=100, allocations={"eve": 1})
    now = utc_now()
    yesterday = (now - DAY).isoformat()
    api_world.apply(event(org_id, "r-1", occurred_at=yesterday), now=now - DAY)
    api_world.apply(event(org_id, "r-2", user_id="eve", occurred_at=now.isoformat()), now=now)
    broken = fields_of(org_id, "r-3", quantiti=2, metadata={"password": "sesame", "a": "ü"})
    api_world.apply(entry(broken), now=now)
    return org_id


def test_dead_letters_are_listed_latest_first(
    api: httpx.Client, reader: Headers, letters: UUID
) -> None:
    listed = read(api, reader, "/dead-letters", org_id=letters)
    assert [(one["request_id"], one["reason"]) for one in listed] == [
        ("r-3", "invalid"),
        ("r-2", "insufficient_credits"),
        ("r-1", "no_allocation"),
    ]
    assert listed[1] | {"id": 0, "occurred_at": "", "created_at": "", "entry_id": ""} == {
        "id": 0,
        "reason": "insufficient_credits",
        "detail": "Insufficient credits: 1 available, 10 needed",
        "org_id": str(letters),
        "request_id": "r-2",
        "user_id": "eve",
        "service_type": "contact_lookup",
        "credits": 10,
        "occurred_at": "",
        "state": "open",
        "created_at": "",
        "resolved_at": None,
        "stream": "metering:usage:0",
        "entry_id": "",
    }


def test_dead_letters_are_filtered(api: httpx.Client, reader: Headers, letters: UUID) -> None:
    def found(**query: Any) -> list[str]:
        listed = read(api, reader, "/dead-letters", org_id=letters, **query)
        return [one["request_id"] for one in listed]

    day_ago = (utc_now() - DAY / 2).isoformat()
    assert found(reason="invalid") == ["r-3"]
    assert found(user_id="eve") == ["r-2"]
    assert found(request_id="r-1") == ["r-1"]
    assert found(state="charged") == []
    assert found(state="all") == ["r-3", "r-2", "r-1"]
    assert found(**{"from": day_ago}) == ["r-3", "r-2"]
    assert found(to=day_ago) == ["r-1"]


def test_dead_letters_come_in_pages(api: httpx.Client, reader: Headers, letters: UUID) -> None:
    query = {"org_id": str(letters), "limit": "2", "offset": "2"}
    answer = api.get(BASE + "/dead-letters", headers=reader, params=query)
    assert [one["request_id"] for one in answer.json()] == ["r-1"]
    assert answer.headers["X-Total-Count"] == "3"


def test_letters_that_are_settled_are_not_open(
    api: httpx.Client, reader: Headers, letters: UUID, api_world: World
) -> None:
    api_world.allocate(letters, "ada", 50)
    api_world.deduct(letters, "r-1")
    listed = read(api, reader, "/dead-letters", org_id=letters)
    assert [one["request_id"] for one in listed] == ["r-3", "r-2"]
    (charged,) = read(api, reader, "/dead-letters", org_id=letters, state="charged")
    assert charged["resolved_at"]


def test_a_dead_letter_shows_its_event_without_secrets(
    api: httpx.Client, reader: Headers, letters: UUID
) -> None:
    (listed,) = read(api, reader, "/dead-letters", org_id=letters, reason="invalid")
    opened = read(api, reader, f"/dead-letters/{listed['id']}")
    assert {name: opened[name] for name in listed} == listed
    assert '"quantiti": 2' in opened["payload"]
    assert '"a": "ü"' in opened["payload"]
    assert "sesame" not in opened["payload"]


def test_a_dead_letter_shows_bytes_that_are_no_text(
    api: httpx.Client, reader: Headers, api_world: World
) -> None:
    broken = entry(b"\xff\x00{")
    api_world.apply(broken)
    (listed,) = read(api, reader, "/dead-letters", reason="malformed", limit=1)
    assert listed["entry_id"] == broken.entry_id
    assert read(api, reader, f"/dead-letters/{listed['id']}")["payload"] == "\\xff\0{"


def test_the_summary_counts_open_letters_by_reason(
    api: httpx.Client, reader: Headers, api_world: World
) -> None:
    before = read(api, reader, "/dead-letters/summary")
    org_id = api_world.organization()
    api_world.apply(event(org_id, "r-1"), event(org_id, "r-2"))
    after = read(api, reader, "/dead-letters/summary")
    name = "no_allocation"
    assert after["reasons"][name] == before["reasons"].get(name, 0) + 2
    assert after["total"] == before["total"] + 2 == sum(after["reasons"].values())


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/dead-letters", {"reason": "boredom"}),
        ("/dead-letters", {"state": "held"}),
        ("/dead-letters", {"org_id": "acme"}),
        ("/dead-letters", {"user_id": "a\0b"}),
        ("/dead-letters", {"user_id": "a" * 256}),
        ("/dead-letters", {"request_id": "a b"}),
        ("/dead-letters", {"from": "2026-03-15T12:30:00"}),
        ("/dead-letters", {"to": "0001-01-01T00:00:00+14:00"}),
        ("/dead-letters", {"to": "9999-12-31T23:59:59-12:00"}),
        ("/dead-letters", {"limit": "0"}),
        ("/dead-letters", {"limit": "501"}),
        ("/dead-letters", {"offset": "1000001"}),
        ("/dead-letters/0", {}),
        (f"/dead-letters/{2**63}", {}),
        ("/dead-letters/one", {}),
        ("/holds", {"state": "charged"}),
        ("/holds", {"limit": str(2**63)}),
        ("/resets/preview", {"at": "tomorrow"}),
        ("/resets/preview", {"at": "9999-12-31T23:59:59-12:00"}),
        ("/resets/preview", {"at": (datetime.now(UTC) + 93 * DAY).isoformat()}),
        ("/resets/preview", {"limit": "501"}),
    ],
)
def test_queries_that_break_a_rule_are_422(
    api: httpx.Client, reader: Headers, path: str, query: dict[str, str]
) -> None:
    answer = api.get(BASE + path, headers=reader, params=query)
    assert refusal(answer) == (422, "invalid_request")
    assert answer.json()["detail"]["fields"] == [*query, "letter_id"][:1]


def test_an_unknown_dead_letter_is_404(api: httpx.Client, reader: Headers) -> None:
    answer = api.get(f"{BASE}/dead-letters/{2**63 - 1}", headers=reader)
    assert refusal(answer) == (404, "not_found")


def test_holds_and_suspected_losses_are_listed(
    api: httpx.Client, reader: Headers, api_world: World
) -> None:
    org_id = api_world.organization(pool=100, allocations={"ada": 100})
    lookup = Operation("contact_lookup")
    now = utc_now()
    held = holds.place(api_world.database, org_id, "ada", lookup, "r-1", DAY / 24, now)
    holds.place(api_world.database, org_id, "ada", lookup, "r-2", DAY / 24, now - DAY)
    holds.expire(api_world.database, now)
    (listed,) = read(api, reader, "/holds", org_id=org_id)
    assert listed.pop("placed_at")
    assert datetime.fromisoformat(listed.pop("expires_at")) == held.expires_at
    assert listed == {
        "org_id": str(org_id),
        "request_id": "r-1",
        "user_id": "ada",
        "service_type": "contact_lookup",
        "state": "held",
        "credits": 10,
    }
    (lost,) = read(api, reader, "/holds", org_id=org_id, state="expired")
    assert (lost["request_id"], lost["state"]) == ("r-2", "expired")
    assert read(api, reader, "/holds", org_id=uuid4()) == []
    assert len(read(api, reader, "/holds", limit=1)) == 1


def make_due(world: World, at: datetime) -> UUID:
    """An organization whose user has used 40 of 100 credits when the month ends at this time."""
    org_id = world.organization(pool=1000, allocations={"ada": 100})
    world.deduct(org_id, "r-1", 40)
    world.sql.execute(
        """
        UPDATE user_credit_allocations
        SET reset_period = 'monthly', last_reset_date = %(at)s - interval '1 month',
            next_reset_date = %(at)s, reset_anchor = %(at)s - interval '1 month'
        WHERE org_id = %(org_id)s
        """,
        {"at": at, "org_id": org_id},
    )
    return org_id


def test_resets_are_previewed_and_run(
    api: httpx.Client, reader: Headers, writer: Headers, api_world: World
) -> None:
    api.post(f"{BASE}/resets/run", headers=writer)  # what other tests left
    at = utc_now().replace(microsecond=0) - timedelta(minutes=1)
    org_id = make_due(api_world, at)

    due = read(api, reader, "/resets")["due_now"]
    assert (due["allocations"], due["pools"]) == (1, 0)
    assert datetime.fromisoformat(due["since"]) == at

    preview = read(api, reader, "/resets/preview", org_id=org_id)
    assert (preview["resets_due"], preview["refreshes_due"], preview["failed"]) == (1, 0, [])
    (reset,) = preview["resets"]
    assert (reset["org_id"], reset["user_id"]) == (str(org_id), "ada")
    assert (reset["used"], reset["drawn"], reset["short"], reset["begins_with"]) == (40, 40, 0, 100)
    assert datetime.fromisoformat(reset["closed_periods"][0]["end"]) == at
    assert api_world.allocations(org_id) == {"ada": (100, 40)}

    answer = api.post(f"{BASE}/resets/run", headers=writer)
    assert answer.json() | {"periods_closed": 1} == {
        "pools_refreshed": 0,
        "credits_refreshed": 0,
        "allocations_reset": 1,
        "periods_closed": 1,
        "credits_drawn": 40,
        "credits_returned": 0,
        "allocations_short": 0,
        "credits_short": 0,
        "organizations_failed": 0,
    }
    assert api_world.allocations(org_id) == {"ada": (100, 0)}
    state = read(api, reader, "/resets")
    assert state["due_now"] == {"allocations": 0, "pools": 0, "since": None}
    assert datetime.fromisoformat(state["next_due"]) > utc_now()


def test_what_is_to_come_can_be_previewed(
    api: httpx.Client, reader: Headers, api_world: World
) -> None:
    at = utc_now().replace(microsecond=0) + 3 * DAY
    org_id, other = make_due(api_world, at), make_due(api_world, at)
    early = read(api, reader, "/resets/preview", org_id=org_id)
    assert early["resets"] == []
    late = read(api, reader, "/resets/preview", at=(at + DAY).isoformat(), limit=1)
    assert late["resets_due"] >= 2
    assert len(late["resets"]) == 1
    for one in (org_id, other):
        assert read(api, reader, "/resets/preview", at=(at + DAY).isoformat(), org_id=one)[
            "resets_due"
        ]


def test_the_latest_run_of_resets_is_shown(
    api: httpx.Client, reader: Headers, api_database: Database
) -> None:
    started_at = utc_now()
    runs.record(api_database, TASK_RESET_DUE, started_at, 0.5, {"credits_short": 3})
    latest = read(api, reader, "/resets")["last_run"]
    assert datetime.fromisoformat(latest.pop("started_at")) == started_at
    assert latest == {"seconds": 0.5, "figures": {"credits_short": 3}}


def test_the_books_are_proved_on_demand(
    api: httpx.Client, reader: Headers, writer: Headers, api_database: Database
) -> None:
    before = utc_now()
    answer = api.post(f"{BASE}/reconcile", headers=writer)
    assert answer.status_code == 200
    found = answer.json()
    report = reconcile(api_database)
    assert found["clean"] is report.is_clean
    assert len(found["drifts"]) == len(report.drifts)
    assert found["figures"] == report.figures
    assert [check["name"] for check in found["checks"]] == [check.name for check in report.checks]
    latest = read(api, reader, "/reconcile")["last_run"]
    assert datetime.fromisoformat(latest["started_at"]) >= before
    assert datetime.fromisoformat(found["taken_at"]) == datetime.fromisoformat(latest["started_at"])
    assert latest["figures"] == report.as_figures()


def test_rows_that_are_off_are_an_answer(
    api: httpx.Client, writer: Headers, api_world: World, api_database_url: str
) -> None:
    org_id = api_world.organization(pool=100)
    shift = (
        "UPDATE organization_credit_pools SET used_credits = used_credits + %s WHERE org_id = %s"
    )
    with psycopg.connect(api_database_url, autocommit=True) as sql:
        sql.execute(shift, (5, org_id))
        try:
            answer = api.post(f"{BASE}/reconcile", headers=writer)
        finally:
            sql.execute(shift, (-5, org_id))
    assert answer.status_code == 200
    found = answer.json()
    assert found["clean"] is False
    (off,) = [one for one in found["organizations"] if one["org_id"] == str(org_id)]
    drifts = [drift for drift in found["drifts"] if drift["org_id"] == str(org_id)]
    assert {drift["check"] for drift in drifts} == set(off["rows"])
    rows_off = {check["name"]: check["rows_off"] for check in found["checks"]}
    assert all(0 < rows <= rows_off[check] for check, rows in off["rows"].items())
