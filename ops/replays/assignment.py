"""Assignment: rows get the organization, the user and the time that they leave open."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from ledger.directory import Allocation
from ops.replays.mapping import EventMapping
from ops.replays.rotation import Rotation
from ops.replays.rows import Row
from schema.errors import ConfigurationError, InvalidEvent
from schema.events import UsageEvent


@dataclass(frozen=True, slots=True)
class Assignment:
    """Turns rows into events, those of one file in their order."""

    mapping: EventMapping
    allocations: Callable[[UUID], Sequence[Allocation]]
    """Gives the users of an organization."""
    now: datetime
    """When events took place, where a row does not say."""
    shift: timedelta = timedelta()
    """What to add to the times of the rows that do."""
    org_id: UUID | None = None
    """Whose events these are, where a row does not say."""
    user_id: str | None = None
    """Whose they are, where a row does not say; None spreads them over the organization."""
    _rotations: dict[UUID, Rotation] = field(default_factory=dict, init=False)

    def check(self) -> None:
        """Check that there is somebody to spread events over, if that is to be done.

        Raises:
            ConfigurationError: the organization has no active allocation.
        """
        names_users = bool(self.user_id) or "user_id" in self.mapping.fields
        if self.org_id and not names_users and not self.allocations(self.org_id):
            raise ConfigurationError(
                f"organization {self.org_id} has no active allocation: allocate credits to "
                "its users, or name one with --user"
            )

    def event(self, row: Row) -> UsageEvent:
        """The event of a row, or `InvalidEvent`.

        The user is chosen before anything else can fail, so that correcting one row later does
        not give the rows after it to other users.
        """
        org_id = self._org_id_of(row)
        user_id = self._user_id_of(row, org_id)
        moment = self.mapping.given("occurred_at", row)
        occurred_at = self.now if moment is None else moment + self.shift
        return self.mapping.event(row, org_id=org_id, user_id=user_id, occurred_at=occurred_at)

    def _org_id_of(self, row: Row) -> UUID:
        given = self.mapping.given("org_id", row)
        if given is None:
            if self.org_id is None:
                raise InvalidEvent("org_id: the row names no organization", fields=["org_id"])
            return self.org_id
        try:
            return UUID(str(given))
        except ValueError:
            raise InvalidEvent(f"org_id: {given!r} is not a UUID", fields=["org_id"]) from None

    def _user_id_of(self, row: Row, org_id: UUID) -> str:
        given: str | None = self.mapping.given("user_id", row) or self.user_id
        if given is not None:
            return given
        if org_id not in self._rotations:
            self._rotations[org_id] = self._rotation(org_id)
        try:
            return self._rotations[org_id].next()
        except ValueError:
            raise InvalidEvent(
                f"user_id: organization {org_id} has no active allocation", fields=["user_id"]
            ) from None

    def _rotation(self, org_id: UUID) -> Rotation:
        """The organization's users, weighted by what they were allocated, used or not."""
        users = self.allocations(org_id)
        return Rotation({user.user_id: user.allocated_credits for user in users})
