"""`metering demo`: watch the whole pipeline work, and survive, in under a minute."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ops.commands import reconcile
from ops.demo import Story, run_demo
from ops.monthend import MonthEnd
from ops.output import AsJson, aside, console, errors_reported, print_json, table
from ops.servers import free_port
from ops.stack import Stack
from ops.stackfile import target_settings
from schema.settings import load_settings


def demo(as_json: AsJson = False) -> None:
    """Run a whole pipeline in a temporary directory, kill a worker, and prove the books."""
    with errors_reported(as_json=as_json), tempfile.TemporaryDirectory(prefix="metering-") as name:
        directory = Path(name)
        stack = Stack(load_settings(data_dir=directory), workers=2, port=free_port(), tell=_tell)
        with stack.running():
            story = run_demo(stack, target_settings(directory), stack.service_token, _tell)
            _tell("stopping")
        if as_json:
            print_json(_document(story))
        else:
            _show(story)
        if not story.is_sound:
            raise typer.Exit(1)


def _tell(text: str) -> None:
    aside.print(f"[dim]· {text}[/]", highlight=False)


def _document(story: Story) -> dict[str, Any]:
    tally = asdict(story.tally)
    tally["reported"] = len(story.tally.reported)
    return {
        "organization": story.organization.model_dump(mode="json"),
        "tally": tally,
        "seconds_to_drain": round(story.seconds_to_drain, 2),
        "balances": story.balances,
        "usage_by_service": story.by_service,
        "dead_letters": story.dead_letters,
        "month_end": asdict(story.month_end),
        "accounted": story.accounted,
        "reconcile": story.report.as_document(),
    }


def _show(story: Story) -> None:
    tally = story.tally
    console.rule(story.organization.display_name)
    console.print(
        f"{tally.operations} operations: {tally.denied} denied at the gate, {tally.failed} failed "
        f"(not reported, not charged), {tally.succeeded} succeeded; {tally.sent_twice} reported "
        f"twice, {tally.malformed} malformed entries; the worker was killed halfway",
        highlight=False,
    )
    _print_rows("Balances (credits)", story.balances)
    _print_rows("Attribution by service (credits, USD)", story.by_service)
    _print_rows("Dead letters", story.dead_letters)
    _show_month_end(story.month_end)
    reconcile.show(story.report)
    verdict = (
        "[green]every reported request is charged once or kept as a dead letter[/]"
        if story.accounted
        else "[red]reported requests and ledger differ[/]"
    )
    console.print(f"{verdict}: {len(story.tally.reported)} requests")


def _show_month_end(end: MonthEnd) -> None:
    for hold in end.lost:
        console.print(
            f"suspected lost operation: {hold.service_type} of {hold.user_id}, {hold.credits:,} "
            "credits were held and are free again",
            highlight=False,
        )
    console.print(f"{end.debts} dead letters were charged after a top-up", highlight=False)
    _print_rows("Balances after the monthly reset (credits)", end.balances)


def _print_rows(title: str, rows: Any) -> None:  # noqa: ANN401 - rows of any report
    if rows:
        columns = [name.replace("_credits", "").replace("_", " ") for name in rows[0]]
        console.print(table(title, columns, [list(row.values()) for row in rows]))
