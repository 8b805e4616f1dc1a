"""`metering resets`: what resets and refreshes are due or to come, and a run of them by hand."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.markup import escape

from ledger.clock import utc_now
from ledger.database import Database
from ledger.directory import find_organization
from ledger.resetplans import PlannedRefresh, PlannedReset
from ledger.resets import Preview, ResetReport, reset_due
from ledger.resets import preview as preview_resets
from ops.output import AsJson, aside, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from ops.times import time_given

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Preview the resets of allocations and the refreshes of pools, or run those that are due."""


@app.command()
def preview(
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="ISO 8601 with offset; now unless given.")
    ] = None,
    org: Annotated[str | None, typer.Option(help="Organization: its id or name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows of a table to show.")] = 100,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run at a time would do as things stand. Nothing is changed."""
    with errors_reported(as_json=as_json):
        moment = time_given("--at", at) if at else utc_now()
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            org_id = find_organization(database, org) if org else None
            found = preview_resets(database, moment, org_id)
        if as_json:
            print_json(found.as_document(moment))
        else:
            _show(found, moment, limit)


@app.command()
def run(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Run what is due now; exit 1 if an organization had to be left, 0 otherwise.

    Workers do the same each minute, so this is safe at any time.
    """
    with errors_reported(as_json=as_json):
        with (
            closing(Database.of(target_settings(data_dir), pool_size=1)) as database,
            aside.status("resetting") as status,
        ):
            report = reset_due(
                database,
                utc_now(),
                tell=lambda so_far: status.update(f"reset {so_far.allocations_reset:,} so far"),
            )
        if as_json:
            print_json(asdict(report))
        else:
            _show_report(report)
        if report.organizations_failed:
            raise typer.Exit(1)


def _show(found: Preview, at: datetime, limit: int) -> None:
    when = at.isoformat(timespec="seconds")
    if found.refreshes:
        console.print(
            table(
                f"Pool refreshes at {when}: {len(found.refreshes):,} (times in UTC)",
                ("organization", "credits", "due", "next refresh"),
                [_refresh_row(plan) for plan in found.refreshes[:limit]],
            )
        )
    columns = ("organization", "user", "period closed", "used", "drawn", "short", "next reset")
    title = f"Resets at {when}: {len(found.resets):,} (times in UTC)"
    console.print(table(title, columns, [_reset_row(plan) for plan in found.resets[:limit]]))
    for org_id, problem in found.failed.items():
        aside.print(f"[red]cannot be reset:[/] {org_id}: {escape(problem)}", highlight=False)


def _refresh_row(plan: PlannedRefresh) -> Sequence[Any]:
    return plan.org_name, plan.total, _moments(plan.dates), f"{plan.next_date:%F %R}"


def _reset_row(plan: PlannedReset) -> Sequence[Any]:
    return (
        plan.org_name,
        plan.user_id,
        f"{plan.period_start:%F %R} to {_moments(plan.boundaries)}",
        plan.used,
        plan.drawn,
        plan.short,
        f"{plan.next_date:%F %R}",
    )


def _moments(dates: Sequence[datetime]) -> str:
    """The first date, and how many more there are: what was missed is caught up as well."""
    more = f" and {len(dates) - 1} more" if len(dates) > 1 else ""
    return f"{dates[0]:%F %R}{more}"


def _show_report(report: ResetReport) -> None:
    rows = [(name.replace("_", " "), figure) for name, figure in asdict(report).items()]
    console.print(table("Resets", ("what", "number"), rows))
    if report.organizations_failed:
        aside.print("[red]some organizations could not be reset:[/] 'resets preview' says why")
