"""`metering reconcile`: recompute every balance, name what is off, and explain a balance."""

from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer

from ledger.database import Database
from ledger.directory import find_organization
from ledger.explain import DEFAULT_LIMIT, MAX_LIMIT, Explanation, Line
from ledger.explain import explain as explain_balance
from ledger.reconcile import Report
from ledger.reconcile import reconcile as reconcile_ledger
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings


def reconcile(
    org: Annotated[str | None, typer.Option(help="Only this organization: its id or name.")] = None,
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="ORG USER", help="Tell how the balance of a user came about instead."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_LIMIT, help="Requests that --explain gives a line each.")
    ] = DEFAULT_LIMIT,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check in one snapshot that balances equal the movements; exit 1 on drift, 0 if clean.

    With --explain list every closed period and movement of one balance, and what they add up to.
    """
    with (
        errors_reported(as_json=as_json),
        closing(Database.of(target_settings(data_dir), pool_size=1)) as database,
    ):
        if explain:
            is_right = _explain(database, *explain, limit, as_json=as_json)
        else:
            is_right = _reconcile(database, org, as_json=as_json)
        if not is_right:
            raise typer.Exit(1)


def _reconcile(database: Database, org: str | None, *, as_json: bool) -> bool:
    org_id = find_organization(database, org) if org else None
    report = reconcile_ledger(database, org_id=org_id)
    if as_json:
        print_json(report.as_document())
    else:
        show(report)
    return report.is_clean


def show(report: Report) -> None:
    """The report for people."""
    rows_off = report.rows_off
    for check in report.checks:
        mark = "[red]drift[/]" if rows_off[check.name] else "[green]holds[/]"
        console.print(f"{mark}  {check.invariant}  {check.meaning}", highlight=False)
    if report.drifts:
        drifts = [(d.check, d.subject, d.recorded, d.computed) for d in report.drifts]
        console.print(table("Drift", ("check", "what", "recorded", "adds up to"), drifts))
        organizations = [
            (str(off.org_id), off.checks, sum(off.rows.values())) for off in report.organizations
        ]
        title = f"{len(organizations)} of {report.figures['organizations']:,} organizations are off"
        console.print(table(title, ("organization", "checks that are off", "rows"), organizations))
    figures = ", ".join(
        f"{value:,} {name.replace('_', ' ')}" for name, value in report.figures.items()
    )
    console.print(f"[dim]{figures}[/]", highlight=False)


def _explain(database: Database, org: str, user_id: str, limit: int, *, as_json: bool) -> bool:
    explanation = explain_balance(database, find_organization(database, org), user_id, limit)
    if as_json:
        print_json(_explanation_document(explanation))
    else:
        _show_explanation(explanation)
    return explanation.is_exact


def _explanation_document(explanation: Explanation) -> dict[str, Any]:
    periods = [asdict(p) | {"remaining": p.remaining} for p in explanation.periods]
    return asdict(explanation) | {"periods": periods, "exact": explanation.is_exact}


def _show_explanation(explanation: Explanation) -> None:
    if explanation.periods:
        columns = ("closed period", "funded", "used", "drawn", "short", "remaining")
        periods = [
            (f"{p.start:%F} to {p.end:%F}", p.funded, p.used, p.drawn, p.short, p.remaining)
            for p in explanation.periods
        ]
        console.print(table("Closed periods", columns, periods))
    columns = ("at", "movement", "credits", "held", "remaining", "what")
    opening = (_time(explanation.period_start), "opening", None, None, explanation.opening, "")
    lines = [
        (_time(line.at), line.kind, line.credits, line.held or None, line.remaining, _what(line))
        for line in explanation.lines
    ]
    console.print(table(f"The period since {opening[0]}", columns, [opening, *lines]))
    mark = "[green]exact[/]" if explanation.is_exact else "[red]drift[/]"
    console.print(
        f"{mark}  remaining: {explanation.computed:,} computed, {explanation.recorded:,} recorded; "
        f"held: {explanation.held_computed:,} computed, {explanation.held_recorded:,} recorded",
        highlight=False,
    )


def _time(moment: datetime) -> str:
    return f"{moment:%F %T}"


def _what(line: Line) -> str:
    number = f"{line.movements:,} movements" if line.movements > 1 else None
    by = f"by {line.actor}" if line.actor else None
    parts = (number, line.request_id, line.service_type, by, line.reason)
    return ", ".join(part for part in parts if part)
