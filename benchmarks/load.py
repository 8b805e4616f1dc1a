"""A load generator for HTTP/1.1: so many connections, each sending its next request at once.

Requests are bytes made beforehand and answers are read no further than needed, so that what is
measured is the server. It runs in a process of its own.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from typing import Final, cast

import uvloop

_HEAD_ENDS: Final = b"\r\n\r\n"
_LENGTH: Final = b"content-length: "


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what they are: whole, as bytes."""

    host: str
    port: int
    requests: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Load:
    """What came of it: seconds that each answer took, in no order, and how many were no 200."""

    elapsed_seconds: float
    seconds: Sequence[float]
    failures: int

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.elapsed_seconds


def post(path: str, host: str, body: bytes, *headers: str) -> bytes:
    """A request to send."""
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    )
    return "\r\n".join(lines).encode() + _HEAD_ENDS + body


def apply_load(target: Target, *, connections: int, seconds: float) -> Load:
    """Load a server for so many seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(_run, target, connections, seconds).result()


def _run(target: Target, connections: int, seconds: float) -> Load:
    return uvloop.run(_load(target, connections, seconds))


async def _load(target: Target, connections: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    clients = [
        _Client(islice(cycle(target.requests), number, None, connections), loop)
        for number in range(connections)
    ]
    for client in clients:
        await loop.create_connection(lambda client=client: client, target.host, target.port)  # type: ignore[misc]
    started = time.perf_counter()
    for client in clients:
        client.begin(started + seconds)
    await asyncio.gather(*(client.done for client in clients))
    return Load(
        time.perf_counter() - started,
        [one for client in clients for one in client.seconds],
        sum(client.failures for client in clients),
    )


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, requests: Iterator[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._requests = requests
        self._received = b""
        self._sent_at = 0.0
        self._until = 0.0
        self.done: asyncio.Future[None] = loop.create_future()
        self.seconds: list[float] = []
        self.failures = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def begin(self, until: float) -> None:
        """Send until then."""
        self._until = until
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(_HEAD_ENDS)
        if not found or len(body) < _length(head):
            return
        now = time.perf_counter()
        self.seconds.append(now - self._sent_at)
        self.failures += not head.startswith(b"HTTP/1.1 200")
        self._received = b""
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            if exc is not None or self._received or time.perf_counter() < self._until:
                self.done.set_exception(exc or ConnectionError("the server hung up"))
            else:
                self.done.set_result(None)


def _length(head: bytes) -> int:
    after = head.lower().partition(_LENGTH)[2]
    return int(after.partition(b"\r\n")[0])
