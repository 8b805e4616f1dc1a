"""`metering holds`: credits set aside now, and operations that may have been lost."""

from dataclasses import asdict
from typing import Annotated

import typer

from ledger import holds as ledger_holds
from ledger.database import Database
from ledger.directory import find_organization
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings


def holds(
    suspected: Annotated[
        bool, typer.Option("--suspected", help="Holds that ran out without an event instead.")
    ] = False,
    org: Annotated[str | None, typer.Option(help="Organization: its id or name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most holds to show.")] = 100,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List open holds; with --suspected those that expired without an event.

    An operation that was allowed, and then neither reported nor released, may have been lost.
    """
    with errors_reported(as_json=as_json):
        database = Database.of(target_settings(data_dir), pool_size=1)
        org_id = find_organization(database, org) if org else None
        listed = ledger_holds.suspects if suspected else ledger_holds.open_holds
        found = listed(database, org_id, limit)
        if as_json:
            print_json([asdict(hold) for hold in found])
            return
        rows = [
            (h.request_id, h.user_id, h.service_type, h.credits, f"{h.expires_at:%F %T}")
            for h in found
        ]
        title = "Suspected lost operations" if suspected else "Open holds"
        columns = ("request", "user", "service", "credits", "expires")
        console.print(table(f"{title}: {len(rows)}", columns, rows))
