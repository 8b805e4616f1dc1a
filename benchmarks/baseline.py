"""What people would write: one Celery task per event that calls `deduct_credits()`."""

import json
import os
from functools import cache
from typing import Any, Final

from celery import Celery
from sqlalchemy import Engine, create_engine, text

QUEUE: Final = "baseline"
TASK: Final = "baseline.deduct"

_DEDUCT: Final = text(
    "SELECT deduct_credits(:org_id, :user_id, :credits, :service_type, NULL, :request_id, "
    "CAST(:metadata AS jsonb))"
)

app = Celery("baseline", broker=os.environ.get("METERING_REDIS_URL"), set_as_current=False)
# Late acknowledgement, since an event must not be lost with its worker.
app.conf.update(
    task_ignore_result=True, task_acks_late=True, task_default_queue="idle", broker_pool_limit=10
)


@cache
def _engine() -> Engine:
    url = os.environ["METERING_DATABASE_URL"]
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


@app.task(name=TASK)
def deduct(event: dict[str, Any]) -> None:
    """Charge one event in a transaction of its own."""
    with _engine().begin() as connection:
        connection.execute(_DEDUCT, event | {"metadata": json.dumps(event["metadata"])})
