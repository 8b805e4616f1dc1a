"""Long lists by pages: `limit` and `offset` in the query, a header that says how many in all."""

from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Query
from pydantic import BaseModel
from starlette.responses import Response

from ledger.pages import Page, Window

TOTAL: Final = "X-Total-Count"
"""The header of an answer with a page: how many there are on all pages."""

Limit = Annotated[int, Query(ge=1, le=500, description="Most items of the page.")]
Offset = Annotated[int, Query(ge=0, le=1_000_000, description="Items that come before the page.")]
DEFAULT_LIMIT: Final = 100

PAGED: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "headers": {
            TOTAL: {
                "description": "How many items there are on all pages.",
                "schema": {"type": "integer", "minimum": 0},
            }
        }
    }
}
"""The answer of a route with pages, for the OpenAPI document."""

Item = TypeVar("Item", bound=BaseModel)


async def _window(limit: Limit = DEFAULT_LIMIT, offset: Offset = 0) -> Window:
    return Window(limit, offset)


AskedWindow = Annotated[Window, Depends(_window)]
"""A route's parameter: which part of its list is asked for."""


def answer(page: Page[Item], response: Response) -> list[Item]:
    """The body of a list's answer; the number of all items goes to its header."""
    response.headers[TOTAL] = str(page.total)
    return page.items
