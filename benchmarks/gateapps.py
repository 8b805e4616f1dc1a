"""What the gate is compared with: an endpoint that does nothing, and one connection per check."""

import os
from typing import Final

import psycopg
from fastapi import FastAPI

from api.routes.gate import PrecheckRequest

_ASK: Final = "SELECT has_sufficient_credits(%s, %s, 10)"

app = FastAPI()


@app.post("/empty")
async def empty(body: PrecheckRequest) -> dict[str, bool]:
    """Read the same body, and ask nobody."""
    del body
    return {"allowed": True}


@app.post("/connecting")
def connecting(body: PrecheckRequest) -> dict[str, bool]:
    """Connect, ask, close: what people would write."""
    with psycopg.connect(os.environ["METERING_DATABASE_URL"]) as connection:
        row = connection.execute(_ASK, (body.org_id, body.user_id)).fetchone()
    return {"allowed": bool(row and row[0])}
