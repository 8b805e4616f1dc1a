"""Questions asked together: none is forgotten, none suffers from another, an outage is one."""

import asyncio
from collections.abc import Sequence

import pytest

from ledger.together import Together
from schema.errors import LedgerUnavailable

SECONDS = 5
"""After which a question counts as forgotten."""


class Doubler:
    """Doubles numbers, together, and keeps what it was asked; what is negative, it cannot."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.is_away = False

    async def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.asked.append(list(numbers))
        if self.is_away:
            await asyncio.sleep(0)
            raise LedgerUnavailable("away")
        if min(numbers) < 0:
            raise ValueError(f"{min(numbers)} is negative")
        return [2 * number for number in numbers]


async def all_of(together: Together[int, int], numbers: Sequence[int]) -> list[int | BaseException]:
    async with asyncio.timeout(SECONDS):
        return await asyncio.gather(*map(together.answer, numbers), return_exceptions=True)


def test_a_question_that_comes_as_the_last_ones_are_answered_is_asked() -> None:
    doubler = Doubler()
    together = Together(doubler, most=10, at_once=1)

    async def one_after_the_other() -> list[int]:
        async with asyncio.timeout(SECONDS):
            return [await together.answer(number) for number in range(3)]

    assert asyncio.run(one_after_the_other()) == [0, 2, 4]


def test_those_that_come_meanwhile_go_together() -> None:
    doubler = Doubler()
    together = Together(doubler, most=2, at_once=1)

    assert asyncio.run(all_of(together, range(5))) == [0, 2, 4, 6, 8]
    assert doubler.asked == [[0, 1], [2, 3], [4]]


def test_a_question_that_cannot_be_answered_spoils_no_other() -> None:
    doubler = Doubler()
    together = Together(doubler, most=10, at_once=1)

    first, second, third = asyncio.run(all_of(together, [1, -1, 3]))
    assert (first, third) == (2, 6)
    assert isinstance(second, ValueError)


def test_an_outage_is_told_to_all_at_once() -> None:
    doubler = Doubler()
    doubler.is_away = True
    together = Together(doubler, most=10, at_once=1)

    answers = asyncio.run(all_of(together, range(5)))
    assert all(isinstance(answer, LedgerUnavailable) for answer in answers)
    assert doubler.asked == [[0, 1, 2, 3, 4]]


def test_who_no_longer_waits_is_not_asked_for() -> None:
    doubler = Doubler()
    together = Together(doubler, most=10, at_once=1)

    async def first_gives_up() -> int:
        async with asyncio.timeout(SECONDS):
            first = asyncio.create_task(together.answer(1))
            second = asyncio.create_task(together.answer(2))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            return await second

    assert asyncio.run(first_gives_up()) == 4
