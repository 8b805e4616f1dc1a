"""`metering replay`: feed a CSV file of operations through the pipeline and account for each."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ledger.database import Database
from ledger.directory import find_organization, newest_test_organization
from ops.output import AsJson, aside, console, errors_reported, print_json, table
from ops.replays.mapping import EventMapping
from ops.replays.mappingfile import load_mapping, load_preset
from ops.replays.replay import OUTAGE_SECONDS, Order, Replay, Watch
from ops.replays.report import Report
from ops.stackfile import DataDir, target_settings
from schema.errors import ConfigurationError

INCOMPLETE: Final = 1
INTERRUPTED: Final = 130


def replay(
    file: Annotated[Path, typer.Argument(help="CSV file with a header, plain or gzip.")],
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Mapping of columns to event fields (TOML).")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A mapping that comes along, such as azure-llm.")
    ] = None,
    org: Annotated[
        str | None,
        typer.Option(
            help="Organization: its id or name; the newest test organization unless given."
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(help="User id; all users, weighted by their credits, unless given."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Send nothing if any row cannot be mapped.")
    ] = False,
    keep_times: Annotated[
        bool, typer.Option("--keep-times", help="Do not move the last event to now.")
    ] = False,
    outage_seconds: Annotated[
        float, typer.Option(min=1, help="Longest outage of Redis or PostgreSQL to sit out.")
    ] = OUTAGE_SECONDS,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Send the rows of a file as usage events, wait until all are applied, and account for each.

    Replaying a file again is harmless: every row is recognized. Exits with 1 if rows could not be
    mapped or events were lost.
    """
    with errors_reported(as_json=as_json):
        mapping = _mapping(map_file, preset)
        settings = target_settings(data_dir)
        with closing(Database.of(settings, pool_size=1)) as database:
            order = Order(
                file,
                mapping,
                _organization(database, mapping, org),
                user,
                strict=strict,
                keep_times=keep_times,
                outage_seconds=outage_seconds,
            )
            with _progress(hidden=as_json and not aside.is_terminal) as watch:
                report = _run(Replay(settings, database, order, watch))
        _show(report, as_json=as_json)
        if not report.is_complete:
            raise typer.Exit(INCOMPLETE)


def _mapping(map_file: Path | None, preset: str | None) -> EventMapping:
    if map_file and preset is None:
        return load_mapping(map_file)
    if preset is not None and not map_file:
        return load_preset(preset)
    raise ConfigurationError("say how to read the file: with either --map FILE.toml or --preset")


def _organization(database: Database, mapping: EventMapping, org: str | None) -> UUID | None:
    if org is not None:
        return find_organization(database, org)
    if "org_id" in mapping.fields:
        return None
    newest = newest_test_organization(database)
    if newest is None:
        raise ConfigurationError(
            "no test organization: make one with 'metering org create', or name one with --org"
        )
    _tell(f"organization {newest.name} ({newest.id}), the newest test organization")
    return newest.id


def _run(chosen: Replay) -> Report:
    try:
        return chosen.run()
    except KeyboardInterrupt:
        _tell(
            f"interrupted: {chosen.sent:,} events were sent and will be applied; the same command "
            "sends the rest and recognizes these"
        )
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Watch]:
    """A bar per stage on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=aside, disable=hidden) as progress:
        stages: dict[str, TaskID] = {}

        def watch(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done, total=total)

        yield watch


def _show(report: Report, *, as_json: bool) -> None:
    for row in report.invalid:
        _tell(f"line {row.line}: {row.reason}")
    if (more := report.invalid_rows - len(report.invalid)) > 0:
        _tell(f"… and {more:,} more rows that could not be mapped")
    if report.missing:
        _tell(f"{report.missing:,} events have no outcome: Redis lost them; replay the file again")
    if as_json:
        print_json(report.as_dict())
    else:
        console.print(table(f"Replay of {escape(report.file)}", ("", "count"), _figures(report)))
        console.print(f"{report.seconds:.2f} s, {report.events_per_second:,.0f} events/s")


def _figures(report: Report) -> Iterator[tuple[str, int]]:
    yield "events", report.events
    yield "charged", report.charged
    yield "duplicates", report.duplicates
    for reason, count in sorted(report.dead.items()):
        yield f"dead: {reason}", count
    if report.missing:
        yield "missing", report.missing
    if report.invalid_rows:
        yield "invalid rows", report.invalid_rows
    yield "credits", report.credits


def _tell(text: str) -> None:
    aside.print(text, markup=False, highlight=False, soft_wrap=True)
