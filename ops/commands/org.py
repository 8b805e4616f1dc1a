"""`metering org`: test organizations, made whole in one step."""

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from ledger.database import Database
from ledger.organizations import CreatedOrganization, TestOrganization, create_test_organization
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from schema.errors import ConfigurationError
from schema.plans import PlanName

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Make test organizations."""


@app.command()
def create(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Test-organization document (JSON).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Unique name of the organization.")] = None,
    display_name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    plan: Annotated[PlanName | None, typer.Option(help="Subscription plan.")] = None,
    credits: Annotated[int | None, typer.Option(min=0, help="Credits of the pool.")] = None,
    user: Annotated[
        list[str] | None, typer.Option(help="EMAIL=CREDITS to allocate; may be repeated.")
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="IANA time zone of its resets.")] = None,
    anchor: Annotated[
        str | None,
        typer.Option(help="From when its periods are counted, like 2028-01-31T00:00+13:00."),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an organization with subscription, credit pool, members and allocations.

    It is marked as a test: metered like any other, never billed. Flags override the document.
    """
    with errors_reported(as_json=as_json):
        flags = {
            "org_name": name,
            "display_name": display_name,
            "subscription_plan": plan,
            "initial_credits": credits,
            "test_users": [_user(text) for text in user] if user else None,
            "timezone": timezone,
            "anchor": anchor,
        }
        document = _document(file, {k: v for k, v in flags.items() if v is not None})
        database = Database.of(target_settings(data_dir), pool_size=1)
        created = create_test_organization(database, document, actor=getpass.getuser())
        if as_json:
            print_json(created.model_dump(mode="json"))
        else:
            _show(created)


def _document(file: Path | None, flags: dict[str, Any]) -> TestOrganization:
    try:
        text = file.read_bytes() if file else b"{}"
        given = TestOrganization.model_validate_json(text) if file else None
        base = given.model_dump(exclude_unset=True) if given else {}
        return TestOrganization.model_validate(base | flags)
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'document'}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise ConfigurationError(f"{file or 'flags'}: {problems}") from None


def _user(text: str) -> dict[str, Any]:
    email, _, amount = text.rpartition("=")
    if not email or not amount.isdecimal():
        raise ConfigurationError(f"--user takes EMAIL=CREDITS, not {text!r}")
    return {"email": email, "allocated_credits": int(amount)}


def _show(created: CreatedOrganization) -> None:
    console.print(
        f"[green]created[/] {escape(created.org_name)}  {created.org_id}  "
        f"{created.subscription_plan} ${created.monthly_price}/month (test, not billed)"
    )
    console.print(
        f"pool: {created.total_credits:,} credits, {created.available_credits:,} not allocated"
    )
    columns = ("user", "role", "credits")
    rows = [(user.user_id, user.role, user.allocated_credits) for user in created.users]
    console.print(table("Allocations", columns, rows))
