"""`metering reconcile`: recompute every balance and name what is off."""

from dataclasses import asdict

import typer

from ledger.database import Database
from ledger.reconcile import Report
from ledger.reconcile import reconcile as reconcile_ledger
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings


def reconcile(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Check in one snapshot that balances equal the movements; exit 1 on drift, 0 if clean."""
    with errors_reported(as_json=as_json):
        report = reconcile_ledger(Database.of(target_settings(data_dir), pool_size=1))
        if as_json:
            print_json(as_document(report))
        else:
            show(report)
        if not report.is_clean:
            raise typer.Exit(1)


def as_document(report: Report) -> dict[str, object]:
    """The report for programs."""
    off = {drift.check for drift in report.drifts}
    return {
        "clean": report.is_clean,
        "taken_at": report.taken_at.isoformat(),
        "figures": report.figures,
        "checks": [
            {
                "name": check.name,
                "invariant": check.invariant,
                "meaning": check.meaning,
                "clean": check.name not in off,
            }
            for check in report.checks
        ],
        "drifts": [asdict(drift) for drift in report.drifts],
    }


def show(report: Report) -> None:
    """The report for people."""
    off = {drift.check for drift in report.drifts}
    for check in report.checks:
        mark = "[red]drift[/]" if check.name in off else "[green]holds[/]"
        console.print(f"{mark}  {check.invariant}  {check.meaning}", highlight=False)
    if report.drifts:
        columns = ("check", "what", "recorded", "adds up to")
        rows = [(d.check, d.subject, d.recorded, d.computed) for d in report.drifts]
        console.print(table("Drift", columns, rows))
    figures = ", ".join(
        f"{value:,} {name.replace('_', ' ')}" for name, value in report.figures.items()
    )
    console.print(f"[dim]{figures}[/]", highlight=False)
