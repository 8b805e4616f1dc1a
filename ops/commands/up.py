"""`metering up`: run the whole pipeline in the foreground."""

import signal
import threading
from dataclasses import asdict
from typing import Annotated

import typer

from ops.output import AsJson, aside, console, errors_reported, print_json
from ops.stack import Stack
from ops.stackfile import FILE_NAME, DataDir
from schema.settings import load_settings


def up(
    data_dir: DataDir = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Celery worker processes.")] = 2,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8000,
    as_json: AsJson = False,
) -> None:
    """Start PostgreSQL, Valkey, workers, beat and API; Ctrl-C stops all.

    PostgreSQL and Valkey are embedded unless METERING_DATABASE_URL and METERING_REDIS_URL name
    servers of yours. Once all is ready, stack.json in the data directory tells other commands
    where everything is.
    """
    with errors_reported(as_json=as_json):
        settings = load_settings(**({"data_dir": data_dir} if data_dir else {}))
        over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: over.set())
        stack = Stack(settings, workers=workers, port=port, tell=_tell, over=over)
        with stack.running():
            if as_json:
                print_json(asdict(stack.file))
            else:
                _welcome(stack)
            stack.watch()
            aside.print("stopping")


def _tell(text: str) -> None:
    aside.print(f"[dim]{text}[/]", highlight=False)


def _welcome(stack: Stack) -> None:
    console.print(f"[green]ready[/]  API {stack.file.api_url}  ·  {stack.directory / FILE_NAME}")
    if stack.login_url:
        console.print(f"log in as anybody at {stack.login_url}")
    console.print(
        f"[dim]service token in {stack.directory / 'service.token'}; logs beside it; "
        "Ctrl-C stops everything[/]"
    )
