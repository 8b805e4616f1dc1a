"""The FastAPI app: `uvicorn --factory api.app:create`."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware

from api import metrics
from api.accesslog import AccessLog
from api.bodies import BodyLimit
from api.errors import UnforeseenErrors, answer_errors_of
from api.readiness import Readiness
from api.requestid import RequestId
from api.resources import REQUEST_THREADS, opened
from api.routes import gate, health
from schema.logs import configure_logs
from schema.settings import Settings, load_settings


def create() -> FastAPI:
    """The app of this process, from its environment.

    Raises:
        ConfigurationError: a setting is unknown or breaks a rule.
    """
    configure_logs()
    server = logging.getLogger("uvicorn")  # one form for all lines: through the root logger
    server.handlers.clear()
    server.propagate = True
    return create_app(load_settings())


def create_app(settings: Settings) -> FastAPI:
    """An app on these settings; it connects when it is started, and lets go when it is stopped."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = REQUEST_THREADS
        with opened(settings) as resources:
            app.state.resources = resources
            app.state.readiness = Readiness(resources)
            yield

    app = FastAPI(
        title="LoopNet Metering",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(kind) for kind in (RequestId, AccessLog, UnforeseenErrors, BodyLimit)
        ],
    )
    answer_errors_of(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(gate.router)
    return app
