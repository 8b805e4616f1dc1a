"""What service tokens may be good for (contract.md §4, Identity)."""

from enum import StrEnum


class Scope(StrEnum):
    """A right of a service."""

    PRECHECK = "precheck"
    """Ask the gate, place and release holds."""
    USAGE_WRITE = "usage:write"
    """Report usage events."""
    DEDUCT = "deduct"
    """Charge a user's credits directly."""
    OPS_READ = "ops:read"
    """Look at queues, dead letters, holds, resets and reconciliations."""
    OPS_WRITE = "ops:write"
    """Act on them."""
