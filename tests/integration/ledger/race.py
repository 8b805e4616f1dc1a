"""One act, done by many threads at once, or by one that has to wait."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ledger.database import Database
from schema.errors import MeteringError
from tests.integration.ledger.world import World

RACERS = 16

Result = TypeVar("Result")


def race(
    database_url: str, act: Callable[[Database, int], Result], racers: int = RACERS
) -> list[Result | MeteringError]:
    """What comes of the act for each thread, told by its number; a connection for every one."""
    database = Database(database_url, pool_size=racers)
    start = threading.Barrier(racers)
    outcomes: list[Result | MeteringError] = []

    def run(number: int) -> None:
        start.wait(30)
        try:
            outcomes.append(act(database, number))
        except MeteringError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    database.close()
    return outcomes


def await_lock(world: World) -> None:
    """Return once somebody waits for a lock in the database."""
    waiting = "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    deadline = time.monotonic() + 30
    while not world.rows(waiting, "pid"):
        assert time.monotonic() < deadline
