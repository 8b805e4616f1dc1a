"""`python -m benchmarks.emitter ORG…`: emit events evenly until it is stopped.

Events are validated beforehand, so that emitting takes little from what is measured beside it.
"""

import sys
import time
from itertools import cycle, islice
from typing import Final
from uuid import UUID, uuid4

from benchmarks.bench import make_events
from producers import UsageEvent, UsageProducer

EVENTS_PER_SECOND: Final = 5_500
"""A few are always under way, so that 5,000 are applied."""
EMITS_PER_SECOND: Final = 50


def main(organizations: list[UUID]) -> None:
    """Emit, evenly."""
    made = make_events(organizations, EVENTS_PER_SECOND)
    templates = cycle(UsageEvent.of(**fields) for _, fields in made)
    portion = EVENTS_PER_SECOND // EMITS_PER_SECOND
    with UsageProducer() as producer:
        due = time.monotonic()
        while True:
            producer.emit_many(
                template.model_copy(update={"request_id": uuid4().hex})
                for template in islice(templates, portion)
            )
            due += 1 / EMITS_PER_SECOND
            time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main([UUID(text) for text in sys.argv[1:]])
