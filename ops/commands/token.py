"""`metering token`: what services present to the API, made, listed and revoked."""

import getpass
import re
from contextlib import closing
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from rich.markup import escape

from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from ledger.servicetokens import ServiceToken
from ops.output import AsJson, aside, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from ops.times import time_given
from schema.errors import ConfigurationError
from schema.scopes import Scope

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Service, such as loopnet-backend.")]


@app.callback()
def _group() -> None:
    """Make, list and revoke the tokens that services present to the API."""


@app.command()
def create(
    name: Name,
    scope: Annotated[list[Scope], typer.Option(help="What it is good for; may be repeated.")],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DAYS|TIME",
            help="When it ends: in days, like 90d, or ISO 8601 with offset; never unless given.",
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, once: only a hash of it is kept.

    The token alone goes to standard output, so that it can be captured. Send it to the API as
    `Authorization: Bearer TOKEN`. Its name is free again once it has expired or was revoked.
    """
    with errors_reported(as_json=as_json):
        now = utc_now()
        expires_at = _end(expires, now) if expires is not None else None
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            text, token = servicetokens.create(
                database, name, scope, actor=getpass.getuser(), expires_at=expires_at, now=now
            )
        if as_json:
            kept = _document(token)
            shown = {key: kept[key] for key in ("id", "name", "scopes", "expires_at")}
            print_json({"token": text, **shown})
            return
        typer.echo(text)
        aside.print(
            f"[green]created[/] {escape(token.name)} for {', '.join(token.scopes)}, "
            f"{f'until {_moment(token.expires_at)}' if token.expires_at else 'without an end'}; "
            "it is not shown again",
            highlight=False,
            soft_wrap=True,
        )


@app.command("list")
def list_(
    every: Annotated[
        bool, typer.Option("--all", help="Also those that have expired or were revoked.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the valid tokens, the newest first; never the tokens themselves."""
    with errors_reported(as_json=as_json):
        now = utc_now()
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            listed = [
                token for token in servicetokens.every(database) if every or token.is_valid(now)
            ]
        if as_json:
            print_json([_document(token) | {"state": _state(token, now)} for token in listed])
            return
        columns = ("name", "scopes", "created (UTC)", "by", "expires (UTC)", "state")
        rows = [
            (
                token.name,
                " ".join(token.scopes),
                f"{token.created_at:%F %T}",
                token.created_by,
                f"{token.expires_at:%F %T}" if token.expires_at else None,
                _state(token, now),
            )
            for token in listed
        ]
        console.print(table(f"Service tokens: {len(rows)}", columns, rows))


@app.command()
def revoke(name: Name, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End a token for good; the API lets it in for five seconds more at the most."""
    with errors_reported(as_json=as_json):
        now = utc_now()
        with closing(Database.of(target_settings(data_dir), pool_size=1)) as database:
            token = servicetokens.revoke(database, name, now=now)
        if as_json:
            print_json(_document(token) | {"state": _state(token, now)})
            return
        console.print(
            f"[green]revoked[/] {escape(token.name)}, which {escape(token.created_by)} made at "
            f"{_moment(token.created_at)}",
            highlight=False,
            soft_wrap=True,
        )


def _end(text: str, now: datetime) -> datetime:
    days = re.fullmatch(r"([0-9]{1,6})d", text)
    if days:
        return now + timedelta(days=int(days[1]))
    try:
        return time_given("--expires", text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error.message}; or days from now, such as 90d") from None


def _state(token: ServiceToken, now: datetime) -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "valid" if token.is_valid(now) else "expired"


def _document(token: ServiceToken) -> dict[str, Any]:
    return {
        "id": str(token.id),
        "name": token.name,
        "scopes": token.scopes,
        "created_by": token.created_by,
        "created_at": token.created_at.isoformat(),
        "expires_at": _moment(token.expires_at),
        "revoked_at": _moment(token.revoked_at),
    }


def _moment(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
