"""What the requests and answers of several routes have in common."""

from typing import Annotated

from pydantic import Field

from ledger.pools import Pool
from schema.money import Usd

Note = Annotated[str, Field(max_length=2000, pattern=r"\A[^\x00]*\z")]
"""Free text that PostgreSQL can hold."""


class CreditPool(Pool):
    """The prepaid credits of an organization; amounts are in USD, all other figures in credits."""

    overage_rate: Usd
    """USD per credit."""
    lifetime_spent_amount: Usd
