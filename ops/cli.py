"""The `metering` command: its parts, put together."""

import logging

import typer

from ops.commands import (
    credits,
    demo,
    emit,
    holds,
    org,
    prices,
    reconcile,
    replay,
    resets,
    status,
    token,
    up,
)
from schema.logs import configure_logs

app = typer.Typer(
    name="metering",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _prepare() -> None:
    """Usage metering for prepaid credits: run it, feed it, look at it, prove it."""
    configure_logs(logging.WARNING)


app.command()(up.up)
app.add_typer(org.app, name="org")
app.command()(emit.emit)
app.command()(replay.replay)
app.command()(status.status)
app.command()(reconcile.reconcile)
app.command()(holds.holds)
app.add_typer(credits.app, name="credits")
app.add_typer(resets.app, name="resets")
app.add_typer(prices.app, name="prices")
app.add_typer(token.app, name="token")
app.command()(demo.demo)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
