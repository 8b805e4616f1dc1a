"""What commands print: tables for people on standard output, JSON for programs, progress aside."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from schema.errors import MeteringError

console: Final = Console()
"""Results."""
aside: Final = Console(stderr=True)
"""Progress, warnings and errors, so that standard output can be piped."""

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(document: object) -> None:
    """Print one JSON document on standard output, without colour or wrapping."""
    typer.echo(json.dumps(document, default=str, indent=2))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose number columns are right-aligned."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    listed = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numbers = bool(listed) and all(
            row[index] is None or (isinstance(row[index], int | float)) for row in listed
        )
        drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in listed:
        drawn.add_row(*(escape(_cell(value)) for value in row))
    return drawn


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def errors_reported(*, as_json: bool) -> Iterator[None]:
    """Print an error of ours with what to do about it and exit with 2; on Ctrl-C exit with 130."""
    try:
        yield
    except MeteringError as error:
        if as_json:
            typer.echo(json.dumps({"detail": error.as_detail()}, default=str), err=True)
        else:
            aside.print("[red]error:[/]", escape(error.message), highlight=False, soft_wrap=True)
            aside.print(error.suggested_action, style="dim", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        aside.print("interrupted")
        raise typer.Exit(130) from None
