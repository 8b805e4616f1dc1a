"""`python -m benchmarks NAME`: run one benchmark and print its figures."""

from typing import Annotated

import typer

from benchmarks import apply
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


if __name__ == "__main__":
    app()
