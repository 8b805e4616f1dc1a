"""The billing history of an organization, as it was written: it is never changed."""

from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, JsonValue

from ledger import pages
from ledger.billing import BillingEvent
from ledger.database import Database
from ledger.organizations import check_exists
from ledger.pages import Page, Window
from schema.money import Usd

_ENTRIES: Final = """
    SELECT
        id, org_id, subscription_id, event_type, amount, currency, payment_status, payment_method,
        paid_at, period_start, period_end, event_metadata, notes, created_at
    FROM org_billing_history
    WHERE org_id = %(org_id)b
        AND (%(event_type)b::text IS NULL OR event_type = %(event_type)b::text)
        AND (%(since)b::timestamptz IS NULL OR created_at >= %(since)b::timestamptz)
        AND (%(until)b::timestamptz IS NULL OR created_at < %(until)b::timestamptz)
"""

# Periods that were caught up on in one transaction have one time.
_NEWEST_FIRST: Final = "created_at DESC, period_start DESC NULLS LAST, id"


class HistoryEntry(BaseModel):
    """What happened to an organization's subscription or was billed to it; times are UTC."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: UUID
    org_id: UUID
    subscription_id: UUID | None
    event_type: BillingEvent
    amount: Usd
    """What is owed or was paid, in `currency`."""
    currency: str
    payment_status: str
    """`pending` until the payment is known, `none` where there is nothing to pay."""
    payment_method: str | None
    paid_at: datetime | None
    period_start: datetime | None
    period_end: datetime | None
    event_metadata: JsonValue
    notes: str | None
    created_at: datetime


def listed(
    database: Database,
    org_id: UUID,
    window: Window,
    *,
    event_type: BillingEvent | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[HistoryEntry]:
    """The entries written from `since` on and before `until`, the newest first.

    Raises:
        NotFound: there is no such organization.
    """
    with database.snapshot() as connection:
        check_exists(connection, org_id)
        return pages.read(
            connection,
            HistoryEntry,
            _ENTRIES,
            _NEWEST_FIRST,
            window,
            org_id=org_id,
            event_type=event_type and event_type.value,
            since=since,
            until=until,
        )
