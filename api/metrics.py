"""`/metrics`: what the scheduled tasks last found, for Prometheus (contract.md §4, row 24).

These figures are read from PostgreSQL for each scrape, so they are the same whichever process of
however many answers. Only of requests that went on uncounted each process tells its own.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.errors import documented
from api.ratelimits import Policy, RateLimits
from api.resources import LedgerDatabase
from ledger import runs
from ledger.database import Database
from schema.wire import TASK_RECONCILE, TASK_RESET_DUE

router = APIRouter(tags=["metrics"])

_FORMAT: Final = "text/plain"


class RunCollector(Collector):
    """The latest runs of the scheduled tasks as gauges; a task that never ran has no value."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges as of now.

        Raises:
            LedgerUnavailable: PostgreSQL does not answer.
        """
        yield from self._reconciliation()
        yield from self._resets()

    def _reconciliation(self) -> Iterator[GaugeMetricFamily]:
        rows = GaugeMetricFamily(
            "metering_reconcile_drift_rows",
            "Rows that the latest reconciliation found to be off.",
            labels=["check"],
        )
        began = GaugeMetricFamily(
            "metering_reconcile_timestamp_seconds",
            "When the latest reconciliation began, in Unix time.",
        )
        took = GaugeMetricFamily(
            "metering_reconcile_duration_seconds", "How long the latest reconciliation took."
        )
        latest = runs.latest(self._database, TASK_RECONCILE)
        if latest:
            for check, number in latest.figures["drifts"].items():
                rows.add_metric([check], number)
            began.add_metric([], latest.started_at.timestamp())
            took.add_metric([], latest.seconds)
        yield from (rows, began, took)

    def _resets(self) -> Iterator[GaugeMetricFamily]:
        began = GaugeMetricFamily(
            "metering_resets_last_run_timestamp_seconds",
            "When resets that are due were last looked for, in Unix time.",
        )
        short = GaugeMetricFamily(
            "metering_resets_short_credits",
            "Credits that the latest resets could not draw, for want of them in the pools.",
        )
        latest = runs.latest(self._database, TASK_RESET_DUE)
        if latest:
            began.add_metric([], latest.started_at.timestamp())
            short.add_metric([], latest.figures["credits_short"])
        yield from (began, short)


class UncheckedCollector(Collector):
    """Requests that rate limits let pass uncounted, for want of Redis."""

    def __init__(self, unchecked: Mapping[Policy, int]) -> None:
        self._unchecked = unchecked

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counts as of now, by policy."""
        counter = CounterMetricFamily(
            "metering_rate_limit_unchecked",
            "Requests that this process let pass uncounted, because Redis did not answer.",
            labels=["policy"],
        )
        for policy, number in self._unchecked.items():
            counter.add_metric([policy], number)
        yield counter


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=documented(503) | {200: {"content": {_FORMAT: {"schema": {"type": "string"}}}}},
)
def metrics(request: Request, database: LedgerDatabase) -> Response:
    """What the latest reconciliation and resets found, and requests that no limit was checked for.

    In Prometheus' text format.
    """
    rate_limits: RateLimits = request.app.state.rate_limits
    registry = CollectorRegistry()
    registry.register(RunCollector(database))
    registry.register(UncheckedCollector(rate_limits.unchecked))
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
