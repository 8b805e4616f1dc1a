"""`metering credits`: move credits by hand, every movement with its actor and reason."""

import getpass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from pydantic import BaseModel

from ledger import allocations, corrections, debts, pools
from ledger.clock import utc_now
from ledger.database import Database
from ledger.directory import find_organization
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from schema.errors import ConfigurationError
from schema.periods import ResetPeriod

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Org = Annotated[str, typer.Option(help="Organization: its id or name.")]
User = Annotated[str, typer.Option(help="User id.")]
Reason = Annotated[str | None, typer.Option(help="Why, for the books.")]
GivenReason = Annotated[str, typer.Option(help="Why, for the books.")]
Actor = Annotated[str | None, typer.Option(help="Who does it; your login name unless given.")]
Key = Annotated[str | None, typer.Option(help="Idempotency key: the same key again moves nothing.")]

SHOWN: Final = (
    "user_id",
    "allocated_credits",
    "used_credits",
    "held_credits",
    "remaining_credits",
    "allowance_credits",
    "reset_period",
    "next_reset_date",
    "is_active",
)


@app.callback()
def _group() -> None:
    """Add, allocate, reclaim and correct credits."""


@app.command()
def show(org: Org, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show an organization's pool and the allocations of its users."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        pool = pools.get(database, org_id)
        found = allocations.of_organization(database, org_id)
        if as_json:
            print_json(
                {
                    "pool": pool.model_dump(mode="json"),
                    "allocations": [one.model_dump(mode="json") for one in found],
                }
            )
            return
        _show(pool)
        rows = [[_shown(getattr(one, name)) for name in SHOWN] for one in found]
        columns = [name.replace("_credits", "").replace("_", " ") for name in SHOWN]
        console.print(table("Allocations", columns, rows))


@app.command()
def add(
    org: Org,
    credits: Annotated[int, typer.Argument(help="Credits; negative in an adjustment only.")],
    kind: Annotated[pools.Kind, typer.Option(help="What kind of movement.")] = pools.Kind.GRANT,
    amount: Annotated[str, typer.Option(help="What was paid or paid back, in USD.")] = "0",
    reason: Reason = None,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Put credits into a pool: purchase (with amount), grant, refund or adjustment."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        pool = pools.add(
            database, org_id, credits, kind=kind, amount=_usd(amount), actor=_who(actor),
            reason=reason, key=key, now=utc_now(),
        )  # fmt: skip
        _answer(pool, as_json=as_json)


@app.command()
def allocate(
    org: Org,
    user: User,
    credits: Annotated[int, typer.Argument(min=1, help="Credits from the pool.")],
    period: Annotated[
        ResetPeriod | None, typer.Option(help="How often it resets; monthly for a new one.")
    ] = None,
    recurring: Annotated[
        bool, typer.Option("--recurring", help="Raise what every reset restores as well.")
    ] = False,
    notes: Annotated[str | None, typer.Option(help="Notes of the allocation.")] = None,
    reason: Reason = None,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Give a user credits; an existing allocation gets them for the running period only."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        allocation = allocations.allocate(
            database, org_id, user, credits, reset_period=period, raise_allowance=recurring,
            notes=notes, actor=_who(actor), reason=reason, key=key, now=utc_now(),
        )  # fmt: skip
        debts.settle(database, utc_now(), org_id)
        _answer(allocation, as_json=as_json)


@app.command()
def reclaim(
    org: Org,
    user: User,
    credits: Annotated[
        int | None, typer.Argument(min=1, help="Credits; all that is unused if not given.")
    ] = None,
    reason: Reason = None,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Take unused credits of a user back into the pool; held ones stay."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        allocation = allocations.reclaim(
            database, org_id, user, credits, actor=_who(actor), reason=reason, key=key,
            now=utc_now(),
        )  # fmt: skip
        _answer(allocation, as_json=as_json)


@app.command()
def deactivate(
    org: Org,
    user: User,
    reason: Reason = None,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Switch an allocation off, as when a member leaves; unused credits return to the pool."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        allocation = allocations.deactivate(
            database, org_id, user, actor=_who(actor), reason=reason, key=key, now=utc_now()
        )
        _answer(allocation, as_json=as_json)


@app.command()
def refund(
    org: Org,
    request: Annotated[str, typer.Argument(help="Request id of the charge.")],
    reason: GivenReason,
    credits: Annotated[
        int | None, typer.Option(min=1, help="Credits to give back; all if not given.")
    ] = None,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Give back what a request was charged, wholly or in part, as a row of its own."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        correction = corrections.refund(
            database, org_id, request, credits, actor=_who(actor), reason=reason, key=key,
            now=utc_now(),
        )  # fmt: skip
        _answer(correction, as_json=as_json)


@app.command()
def adjust(
    org: Org,
    request: Annotated[str, typer.Argument(help="Request id of the charge.")],
    to: Annotated[int, typer.Option(min=0, help="What the request shall cost in all.")],
    reason: GivenReason,
    actor: Actor = None,
    key: Key = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Correct what a request is charged, up or down, as a row of its own."""
    with errors_reported(as_json=as_json):
        database, org_id = _target(data_dir, org)
        correction = corrections.adjust(
            database, org_id, request, to, actor=_who(actor), reason=reason, key=key,
            now=utc_now(),
        )  # fmt: skip
        _answer(correction, as_json=as_json)


@app.command()
def settle(
    org: Annotated[str | None, typer.Option(help="Organization: its id or name.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Charge the debts that are covered by now; workers do so every few seconds."""
    with errors_reported(as_json=as_json):
        database = Database.of(target_settings(data_dir), pool_size=1)
        org_id = find_organization(database, org) if org else None
        settled = debts.settle(database, utc_now(), org_id)
        if as_json:
            print_json({"debts": settled.debts, "credits": settled.credits})
        else:
            console.print(f"{settled.debts:,} debts settled, {settled.credits:,} credits")


def _target(data_dir: DataDir, org: str) -> tuple[Database, UUID]:
    database = Database.of(target_settings(data_dir), pool_size=1)
    return database, find_organization(database, org)


def _who(actor: str | None) -> str:
    return actor or getpass.getuser()


def _usd(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ConfigurationError(f"--amount takes USD like 49.90, not {text!r}") from None


def _answer(result: BaseModel, *, as_json: bool) -> None:
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _show(result)


def _show(result: BaseModel) -> None:
    rows = [
        (name.replace("_", " "), _shown(value))
        for name, value in result.model_dump().items()
        if value is not None
    ]
    console.print(table(type(result).__name__, ("", ""), rows))


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever a model holds
    if isinstance(value, datetime):
        return f"{value:%F %T}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
