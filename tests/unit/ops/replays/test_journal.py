"""The journal: each request once, as it was when it was first noted."""

from contextlib import closing
from uuid import UUID

from ops.replays.journal import PAGE_REQUESTS, Journal

ACME, OTHER = UUID(int=1), UUID(int=2)


def test_requests_are_noted_once_with_whether_they_were_new() -> None:
    with closing(Journal()) as journal:
        journal.add(OTHER, ["r1"], set())
        journal.add(ACME, ["r2", "r1"], {"r2"})
        journal.add(ACME, ["r1", "r3"], {"r1"})
        assert list(journal.pages()) == [
            (ACME, {"r1": True, "r2": False, "r3": True}),
            (OTHER, {"r1": True}),
        ]


def test_pages_have_an_end() -> None:
    with closing(Journal()) as journal:
        journal.add(ACME, [f"r{n}" for n in range(PAGE_REQUESTS + 1)], set())
        assert [len(page) for _, page in journal.pages()] == [PAGE_REQUESTS, 1]
