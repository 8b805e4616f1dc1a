"""The `Idempotency-Key` header: an act that is asked for twice under one key is done once."""

from typing import Annotated

from fastapi import Header

from ledger.idempotency import MAX_CHARACTERS

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_CHARACTERS,
        description="The same key and request again answers with the first result.",
    ),
]
"""A route's parameter: what makes a repetition of its act the same act."""
