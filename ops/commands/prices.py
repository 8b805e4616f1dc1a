"""`metering prices`: the price book, its next versions, and what they would cost."""

from contextlib import closing
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.markup import escape

from ledger import prices, repricing
from ledger.clock import utc_now
from ledger.database import Database
from ledger.prices import NewPrice, PriceChange
from ledger.repricing import Preview, ServicePreview
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from ops.times import time_given
from schema.errors import ConfigurationError
from schema.prices import Price

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Read the price book, add versions to it, and preview what they would cost."""


@app.command("list")
def list_(
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="ISO 8601 with offset; now unless given.")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the prices in force at a time, and those to come."""
    with errors_reported(as_json=as_json):
        moment = time_given("--at", at) if at else utc_now()
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            listed = prices.listing(database, moment)
        if as_json:
            print_json([_document(price, moment) for price in listed])
            return
        columns = ("service", "variant", "credits", "per", "from (UTC)", "state")
        rows = [
            (
                price.service_type,
                price.variant,
                _plain(price.credits),
                price.unit,
                f"{price.effective_from:%F %T}",
                "in force" if price.effective_from <= moment else "to come",
            )
            for price in listed
        ]
        console.print(table(f"Prices at {moment.isoformat(timespec='seconds')}", columns, rows))


@app.command("set")
def set_(
    service: Annotated[str, typer.Argument(help="Service, as events name it.")],
    credits: Annotated[
        str, typer.Option(metavar="N", help="Credits per unit, with up to 6 decimals.")
    ],
    variant: Annotated[
        str | None, typer.Option(help="Variant; unless given, all that have no price of their own.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="What the credits are per; a new service needs it.")
    ] = None,
    effective_from: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="TIME", help="ISO 8601 with offset, not past; now unless given."
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Add a version to the price book. Earlier ones stay, and count for events before it."""
    with errors_reported(as_json=as_json):
        new = NewPrice.of(
            service_type=service,
            variant=variant,
            credits=credits,
            unit=unit,
            effective_from=time_given("--from", effective_from) if effective_from else None,
        )
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            now = utc_now()
            price = prices.set_price(database, new, now)
        if as_json:
            print_json(_document(price, now))
            return
        console.print(
            f"[green]set[/] {escape(new.name)}: {_plain(price.credits)} credits per "
            f"{escape(price.unit)} from {price.effective_from.isoformat()}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def preview(
    change: Annotated[
        list[str],
        typer.Option(metavar="SERVICE[/VARIANT]=CREDITS", help="Another price; may be repeated."),
    ],
    days: Annotated[
        int,
        typer.Option(min=1, max=repricing.MAX_PREVIEW_DAYS, help="Days of usage to price."),
    ] = 30,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what recent usage would have cost under other prices. Nothing is changed."""
    with errors_reported(as_json=as_json):
        changes = [_change(text) for text in change]
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            found = repricing.preview(database, changes, days, utc_now())
        if as_json:
            print_json(_report(found))
            return
        columns = ("service", "requests", "repriced", "charged", "changed", "difference")
        rows = [tuple(_figures(one).values()) for one in (*found.services, found.total)]
        console.print(table(f"Credits since {found.since:%F %T} UTC", columns, rows))


def _change(text: str) -> PriceChange:
    name, equals, credits = text.rpartition("=")
    if not equals:
        raise ConfigurationError(f"--change takes SERVICE[/VARIANT]=CREDITS, not {text!r}")
    service, slash, variant = name.partition("/")
    return PriceChange.of(service_type=service, variant=variant if slash else None, credits=credits)


def _plain(credits: Decimal) -> str:
    return f"{credits.normalize():f}"


def _document(price: Price, at: datetime) -> dict[str, Any]:
    return {
        "service_type": price.service_type,
        "variant": price.variant,
        "credits": _plain(price.credits),
        "unit": price.unit,
        "effective_from": price.effective_from.isoformat(),
        "in_force": price.effective_from <= at,
    }


def _report(found: Preview) -> dict[str, Any]:
    total = _figures(found.total)
    del total["service_type"]
    return {
        "since": found.since.isoformat(),
        "until": found.until.isoformat(),
        "services": [_figures(service) for service in found.services],
        "total": total,
    }


def _figures(service: ServicePreview) -> dict[str, Any]:
    return {
        "service_type": service.service_type,
        "requests": service.requests,
        "repriced": service.repriced,
        "charged": service.charged,
        "changed": service.changed,
        "difference": service.difference,
    }
