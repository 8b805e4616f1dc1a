"""Idempotency keys: an act that is asked for twice under one key is done once (contract.md §4).

The key is written first, in the transaction of the act itself: a second call that comes meanwhile
waits for the first one to end, and a failed act leaves no key.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from psycopg.types.json import Jsonb
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ledger.database import Database, run, sqlstate
from schema.errors import InvalidRequest, NotFound

MAX_CHARACTERS: Final = 255
"""Of a key, as of every id."""

_FOREIGN_KEY_VIOLATION: Final = "23503"
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
"""NUL and halves of surrogate pairs: PostgreSQL's text holds neither."""

Result = TypeVar("Result", bound=BaseModel)

_CLAIM: Final = """
    INSERT INTO idempotency_keys (org_id, key, act, arguments, created_at)
    VALUES (%(org_id)b, %(key)b::text, %(act)b::text, %(arguments)b, %(now)b)
    ON CONFLICT (org_id, key) DO NOTHING
"""

_FIRST: Final = """
    SELECT act, arguments, result
    FROM idempotency_keys
    WHERE org_id = %(org_id)b AND key = %(key)b::text
"""

_KEEP: Final = """
    UPDATE idempotency_keys
    SET result = %(result)b
    WHERE org_id = %(org_id)b AND key = %(key)b::text
"""


@dataclass(frozen=True, slots=True)
class Act:
    """What is asked for; it is the same again if name and arguments are, whoever asks."""

    name: str
    org_id: UUID
    arguments: Mapping[str, object]
    actor: str
    key: str | None
    now: datetime


def once(
    database: Database, act: Act, model: type[Result], perform: Callable[[Connection], Result]
) -> Result:
    """Perform an act in one transaction, or answer what came of it under this key before.

    Idempotent by key; without one the act is performed.

    Raises:
        InvalidRequest: the key was used for another act, or a text cannot be stored.
        NotFound: a key was given, and there is no such organization.
    """
    _check(act)
    with database.transaction() as connection:
        return once_within(connection, act, model, perform)


def once_within(
    connection: Connection, act: Act, model: type[Result], perform: Callable[[Connection], Result]
) -> Result:
    """What `once` does, as a part of a transaction of the caller."""
    _check(act)
    if act.key is None:
        return perform(connection)
    first = _claim(connection, act, act.key)
    if first is not None:
        return model.model_validate(first)
    result = perform(connection)
    kept = Jsonb(result.model_dump(mode="json"))
    run(connection, _KEEP, org_id=act.org_id, key=act.key, result=kept)
    return result


def check_texts(**texts: object) -> None:
    """Refuse text that PostgreSQL cannot hold; other values pass.

    Raises:
        InvalidRequest: one holds a NUL or an unpaired surrogate.
    """
    for name, text in texts.items():
        if isinstance(text, str) and _UNSTORABLE.search(text):
            raise InvalidRequest(
                f"{name}: must not contain a NUL character or unpaired surrogate", fields=[name]
            )


def check_id(name: str, text: str) -> None:
    """Refuse what cannot be an id: of a user, an actor, a key.

    Raises:
        InvalidRequest: it is empty, too long, or cannot be stored.
    """
    check_texts(**{name: text})
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise InvalidRequest(f"{name}: must have 1 to {MAX_CHARACTERS} characters", fields=[name])


def _check(act: Act) -> None:
    if act.key is not None:
        check_id("Idempotency-Key", act.key)
    check_id("actor", act.actor)
    check_texts(**act.arguments)


def _claim(connection: Connection, act: Act, key: str) -> dict[str, Any] | None:
    """Take the key, or read the result of the act that has it."""
    arguments = to_jsonable_python(act.arguments)
    # A key may be cleared away between the two statements; then it is free.
    while not _insert(connection, act, key, arguments):
        row = run(connection, _FIRST, org_id=act.org_id, key=key).one_or_none()
        if row is not None:
            if (row.act, row.arguments) != (act.name, arguments):
                raise InvalidRequest(
                    f"Idempotency-Key: {key} was used for another request",
                    fields=["Idempotency-Key"],
                )
            first: dict[str, Any] = row.result
            return first
    return None


def _insert(connection: Connection, act: Act, key: str, arguments: object) -> bool:
    """Write the key; false if it is there, once the transaction that wrote it has ended."""
    try:
        inserted = run(
            connection,
            _CLAIM,
            org_id=act.org_id,
            key=key,
            act=act.name,
            arguments=Jsonb(arguments),
            now=act.now,
        )
    except IntegrityError as error:
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise NotFound(f"no organization {act.org_id}") from error
    return inserted.rowcount > 0
