"""`metering emit`: report one operation by hand."""

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final
from uuid import uuid4

import jiter
import typer

from ledger import requests
from ledger.database import Database
from ledger.directory import find_organization
from ops.output import AsJson, console, errors_reported, print_json
from ops.stackfile import DataDir, target_settings
from producers import InvalidEvent, UsageProducer
from schema.errors import Unavailable
from schema.events import UsageEvent
from schema.plans import KeySource

POLL_SECONDS: Final = 0.1


def emit(
    org: Annotated[str, typer.Option(help="Organization: its id or name.")],
    user: Annotated[str, typer.Option(help="User id.")],
    service: Annotated[str, typer.Option(help="Service type, such as company_enrichment.")],
    variant: Annotated[str | None, typer.Option(help="Variant, such as full.")] = None,
    quantity: Annotated[str | None, typer.Option(help="Units used.  [default: 1]")] = None,
    credits: Annotated[
        int | None, typer.Option(help="Credits, for a service without a price.")
    ] = None,
    api_cost: Annotated[str | None, typer.Option(help="Upstream cost in USD.")] = None,
    key_source: Annotated[KeySource | None, typer.Option(help="Whose API key.")] = None,
    service_name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Made if not given.")] = None,
    occurred_at: Annotated[
        str | None, typer.Option(help="ISO 8601 with offset.  [default: now]")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object.")] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the outcome; 0 does not wait.")
    ] = 0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Report one successful operation, as LoopNet does after each."""
    with errors_reported(as_json=as_json):
        settings = target_settings(data_dir)
        database = Database.of(settings, pool_size=1)
        fields = {
            "request_id": request_id or f"cli:{uuid4()}",
            "org_id": find_organization(database, org),
            "user_id": user,
            "service_type": service,
            "variant": variant,
            "quantity": Decimal(1) if quantity is None else quantity,
            "credits": credits,
            "api_cost": api_cost,
            "key_source": key_source or KeySource.MANAGED,
            "service_name": service_name,
            "occurred_at": occurred_at or datetime.now(UTC),
            "metadata": _json_object(metadata),
            "source": "cli",
        }
        event = UsageEvent.of(**fields)
        with UsageProducer(settings) as producer:
            result: dict[str, Any] = {
                "request_id": event.request_id,
                "entry_id": producer.emit(event),
            }
        if wait:
            result |= _outcome(database, event, wait)
        if as_json:
            print_json(result)
        else:
            text = "  ".join(f"{name}: {value}" for name, value in result.items())
            console.print(text, markup=False, soft_wrap=True)


def _json_object(text: str | None) -> Any:  # noqa: ANN401 - the event checks it
    if text is None:
        return {}
    try:
        return jiter.from_json(text.encode())
    except ValueError as error:
        raise InvalidEvent(f"metadata: not JSON: {error}", fields=["metadata"]) from None


def _outcome(database: Database, event: UsageEvent, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = requests.states(database, event.org_id, [event.request_id]).get(event.request_id)
        if found:
            return {"state": found.state, "credits": found.credits, "reason": found.reason}
        time.sleep(POLL_SECONDS)
    raise Unavailable(f"no outcome of {event.request_id} after {seconds:g} s")
