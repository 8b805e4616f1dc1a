"""Money: amounts in USD, exact inside and plain numbers in JSON."""

from decimal import Decimal
from typing import Annotated

from pydantic import PlainSerializer

Usd = Annotated[Decimal, PlainSerializer(float, return_type=float, when_used="json")]
"""Callers read a JSON number; amounts have at most 14 digits, which it holds exactly."""
