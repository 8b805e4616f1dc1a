"""The service token that a stack keeps in its directory, for trying the API out."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from schema.errors import NotFound
from schema.scopes import Scope

FILE_NAME: Final = "service.token"
NAME: Final = "metering-up"
"""How the token is called among all service tokens."""


def kept_token(directory: Path) -> str:
    """The token in the directory; a new one where there is none, or none of today's form."""
    path = directory / FILE_NAME
    text = path.read_text("utf-8", "replace").strip() if path.exists() else ""
    if not servicetokens.is_well_formed(text):
        text = servicetokens.new_text()
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(text, "utf-8")
        draft.replace(path)
    return text


def let_in(database: Database, directory: Path, tell: Callable[[str], None]) -> None:
    """Have the API know the token of the directory, with every scope.

    It takes the place of the one before, if its file was removed. A token that somebody has
    revoked stays revoked, and they are told how to come by a new one.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    text = kept_token(directory)
    token = servicetokens.find(database, servicetokens.hash_of(text))
    if token is None:
        _register(database, text, tell)
    elif not token.is_valid(utc_now()):
        tell(
            f"the service token in {directory / FILE_NAME} was revoked or has expired, and the "
            "API refuses it: remove the file and start again, or make a token with "
            "'metering token create'"
        )


def _register(database: Database, text: str, tell: Callable[[str], None]) -> None:
    now = utc_now()
    with suppress(NotFound):
        servicetokens.revoke(database, NAME, now=now)
        tell(f"there is a new service token {NAME}, and the one before it is revoked")
    servicetokens.register(database, NAME, text, tuple(Scope), actor=NAME, now=now)
