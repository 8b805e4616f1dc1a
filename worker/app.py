"""The Celery app: `celery -A worker.app worker` and `celery -A worker.app beat`.

Its messages are wake-up tokens. They may be lost, doubled or late without harm, hence no late
acknowledgement, no results and short expiry.
"""

from typing import Any, Final

from celery import Celery
from celery.signals import setup_logging

from schema.logs import configure_logs
from schema.settings import Settings, load_settings
from schema.wire import (
    CELERY_QUEUE,
    TASK_EXPIRE_HOLDS,
    TASK_RECONCILE,
    TASK_RESET_DUE,
    TASK_ROLL_OVER,
    TASK_SETTLE,
    TASK_SWEEP,
)

SWEEP_SECONDS: Final = 1.0

SCHEDULE_SECONDS: Final = {
    TASK_SWEEP: SWEEP_SECONDS,
    TASK_EXPIRE_HOLDS: 10.0,
    TASK_SETTLE: 5.0,
    TASK_RESET_DUE: 60.0,
    TASK_ROLL_OVER: 60.0,
    TASK_RECONCILE: 300.0,
}
"""How often beat starts each task; they compute what is due, so a missed start is no loss."""


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's configuration for these settings."""
    return {
        "broker_url": settings.celery_broker_url,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "retry_on_timeout": True,
            "max_retries": 1,
        },
        "task_default_queue": CELERY_QUEUE,
        "task_ignore_result": True,
        "task_acks_late": False,
        "task_publish_retry": False,
        "worker_prefetch_multiplier": 1,
        "worker_enable_remote_control": True,
        "beat_schedule": {
            task: {
                "task": task,
                "schedule": seconds,
                "options": {"expires": max(seconds, 2 * SWEEP_SECONDS)},
            }
            for task, seconds in SCHEDULE_SECONDS.items()
        },
        "beat_max_loop_interval": SWEEP_SECONDS,
        "timezone": "UTC",
        "include": ["worker.tasks"],
    }


@setup_logging.connect
def _configure_logs(**_: object) -> None:
    configure_logs()


app = Celery("metering", set_as_current=False)
app.config_from_object(configuration(load_settings()))
