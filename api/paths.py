"""The bases of paths that limits of rate and size tell apart (contract.md §4)."""

from typing import Final

API: Final = "/api/"
"""Everything below it is for callers who are known, paths that do not exist included."""
ORG_BILLING: Final = "/api/v1/org-billing"
PRECHECK: Final = "/api/v1/precheck"
USAGE_EVENTS: Final = "/api/v1/usage/events"


def is_at(path: str, base: str) -> bool:
    """Whether a path is this one, or below it."""
    return path.startswith(base) and (len(path) == len(base) or path[len(base)] == "/")
