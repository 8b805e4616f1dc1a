"""Organizations for the benchmarks, each with users who cannot run out of credits."""

from typing import Final
from uuid import UUID, uuid4

from ledger.database import Database, run

_CREATE: Final = """
    INSERT INTO organizations (id, name, display_name) VALUES (%(org_id)s, %(name)s, 'bench')
"""
_FILL: Final = "SELECT add_credits_to_pool(%(org_id)s, %(credits)s)"
_JOIN: Final = """
    INSERT INTO organization_members (org_id, user_id)
    SELECT %(org_id)s, 'user-' || n
    FROM generate_series(1, %(users)s) n
"""
_ALLOCATE: Final = """
    SELECT allocate_credits_to_user(%(org_id)s, 'user-' || n, %(credits)s)
    FROM generate_series(1, %(users)s) n
"""


def make_organizations(
    database: Database, number: int, *, users: int, credits_each: int
) -> list[UUID]:
    """Make organizations with users named `user-1` and so on; their ids."""
    made = [uuid4() for _ in range(number)]
    with database.transaction() as connection:
        for org_id in made:
            run(connection, _CREATE, org_id=org_id, name=str(org_id))
            run(connection, _FILL, org_id=org_id, credits=users * credits_each)
            run(connection, _JOIN, org_id=org_id, users=users)
            run(connection, _ALLOCATE, org_id=org_id, credits=credits_each, users=users)
    return made
