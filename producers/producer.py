"""Put usage events on their organization's stream."""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from schema.errors import ConfigurationError, QueueUnavailable
from schema.events import UsageEvent
from schema.settings import Settings, load_settings
from schema.wire import (
    CELERY_QUEUE,
    EVENT_FIELD,
    TASK_DRAIN,
    TOKEN_EXPIRES_SECONDS,
    shard_of,
    stream_name,
    wake_key,
)

log = structlog.get_logger(__name__)

WAKE_INTERVAL_SECONDS: Final = 1.0


class UsageProducer:
    """Reports successful operations to metering.

    Thread-safe; one per process is enough. Connects on first use. As a context manager it closes
    its connections at the end.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or load_settings()
        url = self._settings.redis_url.get_secret_value()
        if not url:
            raise ConfigurationError("no queue: set METERING_REDIS_URL")
        timeout = self._settings.emit_timeout_seconds
        self._client = Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # A second try could only be late: the caller decides whether to send again.
            retry=Retry(NoBackoff(), 0),
        )
        self._celery = Celery(set_as_current=False)
        self._celery.conf.update(
            broker_url=self._settings.celery_broker_url,
            broker_transport_options={
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
                "max_retries": 0,
            },
            task_publish_retry=False,
            broker_connection_retry=False,
        )
        self._woken_at: dict[int, float] = {}

    def emit(self, event: UsageEvent | None = None, **fields: Any) -> str:  # noqa: ANN401
        """Report one successful operation; returns when Redis has it.

        Give a `UsageEvent`, or its fields. Sending one `request_id` again is harmless: it is
        charged once.

        Returns:
            The id of the stream entry.

        Raises:
            InvalidEvent: a field breaks its rule; the message names it.
            QueueUnavailable: Redis did not answer in time; the event may or may not be there.
        """
        return self.emit_many([event if event is not None else UsageEvent.of(**fields)])[0]

    def emit_many(self, events: Iterable[UsageEvent]) -> list[str]:
        """Report several operations in one round trip, in order.

        Returns:
            The ids of the stream entries.

        Raises:
            QueueUnavailable: Redis did not answer in time; any of the events may be there.
        """
        shards = self._settings.shards
        routed = [(shard_of(event.org_id, shards), event.to_json()) for event in events]
        if not routed:
            return []
        sleeping = self._sleeping(sorted({shard for shard, _ in routed}))
        with self._client.pipeline(transaction=False) as pipeline:
            for shard, payload in routed:
                pipeline.xadd(stream_name(shard), {EVENT_FIELD: payload})
            for shard in sleeping:
                milliseconds = int(WAKE_INTERVAL_SECONDS * 1000)
                pipeline.set(wake_key(shard), 1, nx=True, px=milliseconds)
            try:
                replies = pipeline.execute()
            except RedisError as error:
                raise QueueUnavailable(f"Redis does not take usage events: {error}") from error
        wakes = replies[len(routed) :]
        self._wake([shard for shard, ours in zip(sleeping, wakes, strict=True) if ours])
        return [entry_id.decode() for entry_id in replies[: len(routed)]]

    def _sleeping(self, shards: Sequence[int]) -> list[int]:
        """The shards that this process has not tried to wake during the last second."""
        now = time.monotonic()
        due = [s for s in shards if now - self._woken_at.get(s, 0.0) >= WAKE_INTERVAL_SECONDS]
        self._woken_at.update(dict.fromkeys(due, now))
        return due

    def _wake(self, shards: Sequence[int]) -> None:
        """Send wake-up tokens; without them the sweep finds the events within a second or two."""
        for shard in shards:
            try:
                self._celery.send_task(
                    TASK_DRAIN,
                    (shard,),
                    queue=CELERY_QUEUE,
                    ignore_result=True,
                    expires=TOKEN_EXPIRES_SECONDS,
                )
            except (OperationalError, RedisError, OSError) as error:
                log.warning("wake-up token not sent", shard=shard, error=str(error)[:200])
                return

    def close(self) -> None:
        """Close the connections; the producer may be used again afterwards."""
        self._client.close()
        self._celery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
