"""`/livez` and `/readyz`, for whatever keeps this process running (contract.md §4, row 24)."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from api.errors import documented
from api.readiness import Readiness
from schema.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process runs."""
    return {"status": "alive"}


@router.get("/readyz", responses=documented(503))
async def readyz(request: Request) -> dict[str, Any]:
    """PostgreSQL and Redis answer; 503 names in `away` those that do not."""
    readiness: Readiness = request.app.state.readiness
    away = await readiness.away()
    if away:
        raise Unavailable(f"no answer from {' and '.join(away)}", away=away)
    return {"status": "ready"}
