"""Holds: credits set aside, settled by the event, given back, and never spent twice."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest

from ledger import holds
from ledger.database import Database
from ledger.gate import Operation
from ledger.reconcile import reconcile
from schema.errors import (
    Conflict,
    InsufficientCredits,
    InvalidRequest,
    MeteringError,
    NoAllocation,
    NotAMember,
    NotFound,
)
from tests.integration.ledger.world import NOW, World, event, open_world

LOOKUP = Operation("contact_lookup")
MINUTE = timedelta(minutes=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert reconcile(database, now=NOW).drifts == []


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=1000, allocations={"ada": 100})


def place(
    world: World, org_id: UUID, request_id: str = "r-1", operation: Operation = LOOKUP
) -> holds.Hold:
    return holds.place(world.database, org_id, "ada", operation, request_id, MINUTE, NOW)


def held(world: World, org_id: UUID) -> tuple[int, int]:
    """Used and held credits of ada."""
    where = f"user_credit_allocations WHERE org_id = '{org_id}'"
    ((used, held_credits),) = world.rows(where, "used_credits", "held_credits")
    return used, held_credits


def state(world: World, request_id: str = "r-1") -> str:
    ((found,),) = world.rows(f"usage_requests WHERE request_id = '{request_id}'", "state")
    return str(found)


def test_a_hold_sets_credits_aside(world: World, org_id: UUID) -> None:
    hold = place(world, org_id)
    assert hold == holds.Hold("r-1", 10, 100, NOW + MINUTE)
    assert held(world, org_id) == (0, 10)
    assert place(world, org_id, "r-2").available == 90


def test_the_same_hold_again_is_the_first_one(world: World, org_id: UUID) -> None:
    first = place(world, org_id)
    before = world.contents()
    assert place(world, org_id) == first
    assert world.contents() == before


def test_the_same_id_for_something_else_is_a_conflict(world: World, org_id: UUID) -> None:
    place(world, org_id)
    with pytest.raises(Conflict):
        place(world, org_id, operation=Operation("contact_lookup", quantity=LOOKUP.quantity + 1))
    world.allocate(org_id, "bob", 100)
    with pytest.raises(Conflict):
        holds.place(world.database, org_id, "bob", LOOKUP, "r-1", MINUTE, NOW)
    assert world.rows("user_credit_allocations", "user_id", "held_credits") == [
        ("ada", 10),
        ("bob", 0),
    ]


@pytest.mark.parametrize(("quantity", "used"), [("1", 10), ("0.3", 3), ("9", 90), ("10", 100)])
def test_an_event_settles_its_hold_at_its_own_price(
    world: World, org_id: UUID, quantity: str, used: int
) -> None:
    place(world, org_id, operation=LOOKUP)
    outcome = world.apply(event(org_id, quantity=quantity))
    assert outcome.charged == 1
    assert held(world, org_id) == (used, 0)
    assert state(world) == "charged"
    assert world.apply(event(org_id, quantity=quantity)).duplicates == 1
    assert held(world, org_id) == (used, 0)


def test_an_event_beyond_hold_and_credits_dies_and_frees_the_hold(
    world: World, org_id: UUID
) -> None:
    place(world, org_id)
    place(world, org_id, "r-2")
    outcome = world.apply(event(org_id, quantity="9.1"))  # 91 of 90 beside the other hold
    assert outcome.dead == {"insufficient_credits": 1}
    assert held(world, org_id) == (0, 10)
    assert state(world) == "dead"


def test_an_event_that_cannot_be_priced_frees_its_hold(world: World, org_id: UUID) -> None:
    place(world, org_id)
    assert world.apply(event(org_id, credits=11)).dead == {"price_mismatch": 1}
    assert held(world, org_id) == (0, 0)


def test_another_users_event_does_not_touch_the_hold(world: World, org_id: UUID) -> None:
    world.allocate(org_id, "bob", 100)
    place(world, org_id)
    assert world.apply(event(org_id, user_id="bob")).dead == {"request_id_conflict": 1}
    assert state(world) == "held"


@pytest.mark.parametrize("ended", ["released", "expired"])
def test_a_late_success_is_charged(world: World, org_id: UUID, ended: str) -> None:
    place(world, org_id)
    if ended == "released":
        holds.release(world.database, org_id, "r-1", NOW)
    else:
        assert holds.expire(world.database, NOW + MINUTE) == 1
    assert held(world, org_id) == (0, 0)
    assert state(world) == ended
    assert world.apply(event(org_id)).charged == 1
    assert held(world, org_id) == (10, 0)


def test_an_event_before_its_hold_is_charged_once(world: World, org_id: UUID) -> None:
    world.apply(event(org_id))
    with pytest.raises(Conflict):
        place(world, org_id)
    assert held(world, org_id) == (10, 0)


def test_a_direct_call_settles_the_hold(world: World, org_id: UUID) -> None:
    place(world, org_id)
    place(world, org_id, "other", Operation("x", credits=85))
    assert world.deduct(org_id, "r-1", 15)  # its own 10, and the 5 that nobody holds
    assert held(world, org_id) == (15, 85)
    assert world.apply(event(org_id, quantity="1.5")).duplicates == 1
    with pytest.raises(psycopg.errors.RaiseException, match="0 available, 1 needed"):
        world.deduct(org_id, "r-2", 1)


def test_a_direct_call_of_another_service_is_a_conflict(world: World, org_id: UUID) -> None:
    place(world, org_id)
    with pytest.raises(psycopg.errors.RaiseException, match="conflict"):
        world.deduct(org_id, "r-1", 10, service_type="valuation")


def test_release_is_idempotent_and_final_states_stay(world: World, org_id: UUID) -> None:
    place(world, org_id)
    holds.release(world.database, org_id, "r-1", NOW)
    before = world.contents()
    holds.release(world.database, org_id, "r-1", NOW)
    assert world.contents() == before
    world.apply(event(org_id))
    with pytest.raises(Conflict, match="charged"):
        holds.release(world.database, org_id, "r-1", NOW)
    with pytest.raises(NotFound):
        holds.release(world.database, org_id, "nothing", NOW)


def test_a_released_request_can_be_held_anew(world: World, org_id: UUID) -> None:
    place(world, org_id)
    holds.release(world.database, org_id, "r-1", NOW)
    later = NOW + 2 * MINUTE
    again = holds.place(world.database, org_id, "ada", LOOKUP, "r-1", MINUTE, later)
    assert again.expires_at == later + MINUTE
    assert held(world, org_id) == (0, 10)


def test_only_overdue_holds_expire_and_become_suspects(world: World, org_id: UUID) -> None:
    place(world, org_id, "old")
    holds.place(world.database, org_id, "ada", LOOKUP, "new", 3 * MINUTE, NOW)
    assert holds.expire(world.database, NOW + MINUTE - timedelta(seconds=1)) == 0
    assert holds.expire(world.database, NOW + MINUTE) == 1
    assert holds.expire(world.database, NOW + MINUTE) == 0
    assert [hold.request_id for hold in holds.open_holds(world.database, org_id)] == ["new"]
    (suspect,) = holds.suspects(world.database, org_id)
    assert (suspect.request_id, suspect.credits, suspect.user_id) == ("old", 10, "ada")
    world.apply(event(org_id, "old"))
    assert holds.suspects(world.database) == []


def test_more_holds_than_one_batch_expire(world: World) -> None:
    org_id = world.organization(pool=10**6, allocations={"ada": 10**6})
    world.sql.execute(
        """
        SELECT place_hold(%s, 'ada', 'contact_lookup', NULL, 1, NULL, 'r-' || n, '1 min', %s)
        FROM generate_series(1, 1500) n
        """,
        (org_id, NOW),
    )
    assert held(world, org_id) == (0, 15_000)
    assert holds.expire(world.database, NOW + MINUTE) == 1500
    assert held(world, org_id) == (0, 0)


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (Operation("teleportation"), InvalidRequest),
        (Operation("contact_lookup", credits=11), InvalidRequest),
        (Operation("market_analysis"), InsufficientCredits),
    ],
)
def test_what_cannot_be_held_is_refused(
    world: World, org_id: UUID, operation: Operation, error: type[MeteringError]
) -> None:
    before = world.contents()
    with pytest.raises(error):
        place(world, org_id, operation=operation)
    assert world.contents() == before


def test_strangers_are_refused(world: World, org_id: UUID) -> None:
    with pytest.raises(NotAMember):
        holds.place(world.database, org_id, "eve", LOOKUP, "r-1", MINUTE, NOW)
    world.join(org_id, "eve")
    with pytest.raises(NoAllocation):
        holds.place(world.database, org_id, "eve", LOOKUP, "r-1", MINUTE, NOW)
    nowhere = UUID(int=1)
    with pytest.raises(NotFound):
        holds.place(world.database, nowhere, "ada", LOOKUP, "r-1", MINUTE, NOW)


def test_who_has_left_is_refused(world: World, org_id: UUID) -> None:
    world.leave(org_id, "ada")
    with pytest.raises(NotAMember):
        holds.place(world.database, org_id, "ada", LOOKUP, "r-1", MINUTE, NOW)


@pytest.mark.parametrize("seconds", [0, 0.5, 86_401])
def test_a_hold_lasts_from_a_second_to_a_day(world: World, org_id: UUID, seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="hold_ttl_seconds"):
        holds.place(world.database, org_id, "ada", LOOKUP, "r-1", timedelta(seconds=seconds), NOW)


def test_64_connections_race_for_the_last_credits(
    world: World, org_id: UUID, database_url: str
) -> None:
    """Ten holds of ten credits fit into a hundred, whoever comes first."""
    racers = 64
    database = Database(database_url, pool_size=racers)
    start = threading.Barrier(racers)
    outcomes: list[str] = []

    def race(number: int) -> None:
        start.wait(30)
        try:
            holds.place(database, org_id, "ada", LOOKUP, f"r-{number}", MINUTE, NOW)
            outcomes.append("allowed")
        except InsufficientCredits:
            outcomes.append("denied")

    threads = [threading.Thread(target=race, args=(number,)) for number in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    database.close()
    assert (outcomes.count("allowed"), outcomes.count("denied")) == (10, racers - 10)
    assert held(world, org_id) == (0, 100)


def test_two_users_gates_race_for_one_request_id(
    world: World, org_id: UUID, database_url: str
) -> None:
    """Neither sees the other's row yet; the second one waits, and is told of the conflict."""
    world.allocate(org_id, "bob", 100)
    outcomes: list[str] = []

    def second() -> None:
        try:
            holds.place(world.database, org_id, "bob", LOOKUP, "r-1", MINUTE, NOW)
            outcomes.append("held")
        except Conflict:
            outcomes.append("conflict")

    with psycopg.connect(database_url) as first:
        first.execute(
            "SELECT place_hold(%s, 'ada', 'contact_lookup', NULL, 1, NULL, 'r-1', '1 min', %s)",
            (org_id, NOW),
        )
        racer = threading.Thread(target=second)
        racer.start()
        waiting = "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        deadline = time.monotonic() + 30
        while not world.rows(waiting, "pid"):
            assert time.monotonic() < deadline
    racer.join(30)
    assert outcomes == ["conflict"]
    allocations = world.rows("user_credit_allocations", "user_id", "held_credits")
    assert allocations == [("ada", 10), ("bob", 0)]


def test_gates_drains_releases_and_expiry_do_not_deadlock(world: World, database_url: str) -> None:
    users = {f"u{number}": 10_000 for number in range(5)}
    org_id = world.organization(pool=10**6, allocations=users)
    database = Database(database_url, pool_size=8)
    errors: list[Exception] = []

    def work(part: int) -> None:
        try:
            for number in range(40):
                name = f"{part}-{number}"
                user = f"u{number % 5}"
                holds.place(database, org_id, user, LOOKUP, name, MINUTE, NOW)
                if number % 4 == 0:
                    holds.release(database, org_id, name, NOW)
                if number % 8 == 5:
                    holds.expire(database, NOW + MINUTE)
                if number % 10 == 9:
                    batch = [
                        event(org_id, f"{part}-{n}", user_id=f"u{n % 5}")
                        for n in range(number, number - 10, -1)
                    ]
                    World(database, world.sql).apply(*batch)
        except Exception as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    database.close()
    assert errors == []
    assert len(world.rows("usage_requests WHERE state = 'charged'", "request_id")) == 240
