"""What LoopNet imports to report usage.

`UsageProducer` validates a `UsageEvent`, strips secrets from its metadata and puts it on the
organization's Redis stream. Light on purpose: no SQLAlchemy, no FastAPI, no ledger.
"""

from producers.producer import UsageProducer
from schema.errors import InvalidEvent, QueueUnavailable
from schema.events import UsageEvent

__all__ = ["InvalidEvent", "QueueUnavailable", "UsageEvent", "UsageProducer"]
