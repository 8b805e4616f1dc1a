"""Long lists, read a part at a time, and how long the whole of them is."""

from dataclasses import dataclass
from typing import Final, Generic, LiteralString, TypeVar

from pydantic import BaseModel
from sqlalchemy import Connection

from ledger.database import run

Item = TypeVar("Item")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of a list: at most `limit` items, or all, after the first `offset` ones."""

    limit: int | None
    offset: int = 0


EVERYTHING: Final = Window(None)


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A part of a list; `total` counts the items of all of it."""

    items: list[Item]
    total: int


def read(
    connection: Connection,
    model: type[Model],
    query: LiteralString,
    order: LiteralString,
    window: Window,
    **parameters: object,
) -> Page[Model]:
    """A part of what a query finds, in an order that leaves no two rows equal.

    The query names its columns as the model does its fields. Part and total are of one moment
    within a snapshot.
    """
    counted = "SELECT count(*) FROM (" + query + ") AS found"  # noqa: S608 - all of it literal
    total = run(connection, counted, **parameters)
    rows = run(
        connection,
        query + " ORDER BY " + order + " LIMIT %(limit)b OFFSET %(offset)b",
        limit=window.limit,
        offset=window.offset,
        **parameters,
    )
    return Page([model.model_validate(dict(row)) for row in rows.mappings()], total.scalar_one())
