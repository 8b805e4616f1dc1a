"""The price book as it stands in the database."""

from typing import Final

from sqlalchemy import Connection

from ledger.database import run
from schema.prices import Price, PriceBook

_BOOK: Final = """
    SELECT service_type, variant, credits, unit, effective_from, position FROM service_prices
"""


def book(connection: Connection) -> PriceBook:
    """All versions of all prices, read in the transaction of the caller."""
    return PriceBook(Price(*row) for row in run(connection, _BOOK))
