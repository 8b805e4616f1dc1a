"""`/api/v1/usage/requests`: what became of a request (contract.md §4, row 22)."""

from uuid import UUID

from fastapi import APIRouter

from api.access import Grant, GuardedRoute, allows
from api.errors import documented
from api.resources import LedgerDatabase
from ledger import requests
from ledger.requests import Request
from schema.events import RequestId

router = APIRouter(prefix="/api/v1/usage", tags=["usage"], route_class=GuardedRoute)


@router.get(
    "/requests/{request_id}",
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.ADMIN, Grant.SERVICE),
)
def request(request_id: RequestId, org_id: UUID, database: LedgerDatabase) -> Request:
    """Where a request stands: held, charged, released, expired, dead or discarded.

    One that was emitted a moment ago may still be on its way: 404 until a worker applies it.
    """
    return requests.get(database, org_id, request_id)
