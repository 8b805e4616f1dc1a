"""Dead letters as operators look for them: filtered, by page, and one with its payload."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from ledger import deadletters
from ledger.database import Database
from ledger.deadletters import DeadLetter, LetterState, Sought
from ledger.pages import Window
from schema.errors import DeadReason, NotFound
from tests.integration.ledger.world import NOW, World, entry, event, fields_of, open_world

HOUR = timedelta(hours=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


def found(world: World, **sought: object) -> list[str | None]:
    page = deadletters.page(world.database, Sought(**sought), Window(100))  # type: ignore[arg-type]
    assert page.total == len(page.items)
    return [letter.request_id for letter in page.items]


def test_a_letter_tells_all_that_is_known(world: World) -> None:
    org_id = world.organization()
    content = entry(event(org_id))
    world.apply(content)
    (letter,) = deadletters.page(world.database, Sought(), Window(1)).items
    assert letter == DeadLetter(
        id=letter.id,
        reason="no_allocation",
        detail=letter.detail,
        org_id=org_id,
        request_id="r-1",
        user_id="ada",
        service_type="contact_lookup",
        credits=10,
        occurred_at=NOW,
        state="open",
        created_at=NOW,
        resolved_at=None,
        stream=content.stream,
        entry_id=content.entry_id,
    )


def test_letters_are_found_by_everything_they_tell(world: World) -> None:
    one, other = world.organization(), world.organization(pool=100, allocations={"eve": 1})
    world.apply(event(one, "r-1"), event(one, "r-2", user_id="bob"), now=NOW - HOUR)
    world.apply(event(other, "r-3", user_id="eve"))
    world.apply(entry(b"{"))
    everything = [None, "r-3", "r-2", "r-1"]
    assert found(world) == everything
    assert found(world, state=LetterState.OPEN) == everything
    assert found(world, state=LetterState.CHARGED) == []
    assert found(world, reason=DeadReason.MALFORMED) == [None]
    assert found(world, reason=DeadReason.INSUFFICIENT_CREDITS) == ["r-3"]
    assert found(world, org_id=one) == ["r-2", "r-1"]
    assert found(world, org_id=one, user_id="bob") == ["r-2"]
    assert found(world, request_id="r-1") == ["r-1"]
    assert found(world, since=NOW) == [None, "r-3"]
    assert found(world, until=NOW) == ["r-2", "r-1"]
    assert found(world, since=NOW - HOUR, until=NOW) == ["r-2", "r-1"]
    assert found(world, org_id=uuid4()) == []


def test_pages_follow_one_another_and_know_their_number(world: World) -> None:
    org_id = world.organization()
    for number in range(5):  # all at one time: the order is that of writing
        world.apply(event(org_id, f"r-{number}"))
    pages = [
        deadletters.page(world.database, Sought(), Window(2, offset)) for offset in (0, 2, 4, 6)
    ]
    assert [[letter.request_id for letter in page.items] for page in pages] == [
        ["r-4", "r-3"],
        ["r-2", "r-1"],
        ["r-0"],
        [],
    ]
    assert {page.total for page in pages} == {5}


def payload_of(world: World, payload: bytes) -> str:
    world.apply(entry(payload))
    latest = deadletters.page(world.database, Sought(), Window(1)).items[0]
    opened = deadletters.one(world.database, latest.id)
    assert (opened.id, opened.reason) == (latest.id, latest.reason)
    return opened.payload


@pytest.mark.parametrize("payload", ["{", '{"a" : 1.0,\n"ä": "\\u00e9"}', "[]", ""])
def test_a_payload_is_shown_as_it_came(world: World, payload: str) -> None:
    assert payload_of(world, payload.encode()) == payload


def test_bytes_that_are_no_text_are_shown(world: World) -> None:
    assert payload_of(world, b"\xff{") == r"\xff{"


def test_secrets_of_a_payload_are_not_shown(world: World) -> None:
    org_id = world.organization()
    fields = fields_of(org_id, metadata={"password": "sesame", "company_id": "ü"}, quantiti=2)
    shown = payload_of(world, entry(fields).payload)
    assert "sesame" not in shown
    assert '"company_id": "ü"' in shown


def test_an_unknown_letter_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match="no dead letter 7"):
        deadletters.one(world.database, 7)


def test_a_letter_that_was_charged_says_when(world: World) -> None:
    org_id = world.organization(pool=100)
    now = datetime.now(UTC)
    world.apply(event(org_id, occurred_at=now.isoformat()), now=now)
    world.allocate(org_id, "ada", 50)
    world.deduct(org_id, "r-1")
    (letter,) = deadletters.page(world.database, Sought(state=LetterState.CHARGED), Window(1)).items
    assert letter.request_id == "r-1"
    assert letter.resolved_at is not None
