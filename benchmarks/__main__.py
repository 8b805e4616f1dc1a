"""`python -m benchmarks NAME`: run one benchmark and print its figures."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from benchmarks import apply, gate, holds, reconcile, resets
from ops.output import AsJson, console, errors_reported, print_json, table

app = typer.Typer(no_args_is_help=True, help="Measurements of the performance goals.")


@app.callback()
def _group() -> None:
    """Measurements of the performance goals."""


@app.command("apply")
def apply_command(
    events: Annotated[int, typer.Option(min=100, help="Events per measurement.")] = 40_000,
    baseline_events: Annotated[int, typer.Option(min=10, help="Events of the baseline.")] = 3_000,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, in every case.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare one Celery task per event, this pipeline, and the ledger without a queue."""
    with errors_reported(as_json=as_json):
        figures = apply.measure(
            apply.Plan(events, baseline_events, workers, rounds), tell=apply.tell_aside
        )
        if as_json:
            print_json(figures.as_document())
            return
        console.print(table("Events per second", ("case", "events/s"), figures.rates()))
        rows = [(name, f"{value:.2f}", goal) for name, value, goal in figures.ratios()]
        console.print(table("Ratios", ("ratio", "reached", "goal"), rows))


@app.command("holds")
def holds_command(
    count: Annotated[int, typer.Option("--holds", min=100, help="Holds per round.")] = 8_000,
    baseline_calls: Annotated[int, typer.Option(min=100, help="Calls of the baseline.")] = 2_000,
    threads: Annotated[int, typer.Option(min=1, help="Concurrent callers.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare placing holds with asking has_sufficient_credits() on a new connection per call."""
    with errors_reported(as_json=as_json):
        plan = holds.Plan(count, baseline_calls, threads, rounds)
        figures = holds.measure(plan, apply.tell_aside)
        if as_json:
            print_json(figures.as_document())
            return
        console.print(table("Calls", ("case", "calls/s", "p50 (ms)", "p99 (ms)"), figures.rates()))
        rows = [(name, f"{value:.2f}", goal) for name, value, goal in figures.ratios()]
        console.print(table("Ratios", ("ratio", "reached", "goal"), rows))


@app.command("gate")
def gate_command(
    seconds: Annotated[float, typer.Option(min=0.2, help="Length of each measurement.")] = 5.0,
    connections: Annotated[int, typer.Option(min=1, help="Concurrent callers.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare pre-checks over HTTP with an empty endpoint and with a connection per check."""
    with errors_reported(as_json=as_json):
        figures = gate.measure(gate.Plan(seconds, connections, rounds), apply.tell_aside)
        if as_json:
            print_json(figures.as_document())
            return
        console.print(table("Requests", ("case", "req/s", "p50 (ms)", "p99 (ms)"), figures.rows()))
        rows = [(name, f"{value:.2f}", goal) for name, value, goal in figures.ratios()]
        console.print(table("Ratios", ("ratio", "reached", "goal"), rows))


@app.command("resets")
def resets_command(
    allocations: Annotated[int, typer.Option(min=100, help="Allocations that are due.")] = 100_000,
    as_json: AsJson = False,
) -> None:
    """Reset many due allocations at once, with charges going on beside them."""
    with errors_reported(as_json=as_json):
        _show("Resets", resets.measure(allocations, apply.tell_aside).as_document(), as_json)


@app.command("reconcile")
def reconcile_command(
    attributions: Annotated[int, typer.Option(min=1000, help="Charges in the ledger.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Reconcile a large ledger."""
    with errors_reported(as_json=as_json):
        figures = asdict(reconcile.measure_embedded(attributions))
        _show("Reconcile", figures | {"goal_seconds": reconcile.GOAL_SECONDS}, as_json)


def _show(title: str, figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
    else:
        console.print(table(title, ("figure", ""), list(figures.items())))


if __name__ == "__main__":
    app()
