"""Questions asked together: those that come while others are answered share one round trip."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from schema.errors import Unavailable

Question = TypeVar("Question")
Answer = TypeVar("Answer")
_Waiting = tuple[Question, asyncio.Future[Answer]]


class Together(Generic[Question, Answer]):
    """Collects questions, asks them in batches, and gives each caller their own answer.

    Nothing waits for company: a question that comes alone is asked at once, and under load as many
    as have come meanwhile go together, so that the more there are, the less each costs.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Question]], Awaitable[Sequence[Answer]]],
        *,
        most: int,
        at_once: int,
    ) -> None:
        """`ask` answers up to `most` questions in their order; up to `at_once` calls of it run."""
        self._ask = ask
        self._most = most
        self._at_once = at_once
        self._waiting: list[_Waiting[Question, Answer]] = []
        self._asking: set[asyncio.Task[None]] = set()

    async def answer(self, question: Question) -> Answer:
        """The answer to one question, or the error that asking it alone would raise."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        # One that has ended found nothing waiting, and leaves the set only a moment later.
        if sum(not task.done() for task in self._asking) < self._at_once:
            # In a context of its own: what it logs is not about the first of them alone.
            task = asyncio.create_task(self._ask_all(), context=Context())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return await future

    async def _ask_all(self) -> None:
        while self._waiting:
            batch = self._waiting[: self._most]
            del self._waiting[: self._most]
            await self._ask_batch([one for one in batch if not one[1].done()])

    async def _ask_batch(self, batch: Sequence[_Waiting[Question, Answer]]) -> None:
        try:
            answers = await self._ask([question for question, _ in batch]) if batch else ()
        except Exception as error:  # noqa: BLE001 - it is raised to whoever asked
            if len(batch) > 1 and not isinstance(error, Unavailable):
                for one in batch:  # nobody is to suffer from another's question
                    await self._ask_batch([one])
                return
            # An outage is no question's fault: one after the other they would wait it out in turn.
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
