"""The FastAPI app: `uvicorn --factory api.app:create`."""

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware

from api import metrics, ratelimits
from api.accesslog import AccessLog
from api.authentication import Authentication
from api.bodies import BodyLimit
from api.crossorigin import CrossOrigin
from api.errors import UnforeseenErrors, answer_errors_of
from api.examples import with_examples
from api.jsonschema import in_its_words
from api.origins import allowed_pattern
from api.paths import USAGE_EVENTS
from api.ratelimits import RateLimit, RateLimitHeaders
from api.readiness import Readiness
from api.requestid import RequestId
from api.resources import REQUEST_THREADS, opened
from api.routes import (
    billing,
    credits,
    dev,
    gate,
    health,
    ingest,
    ops,
    organizations,
    requests,
    subscriptions,
    usage,
)
from api.securityheaders import SecurityHeaders
from schema.logs import configure_logs
from schema.settings import Environment, Settings, load_settings

ROUTERS: Final = (
    gate.quick_router,
    gate.router,
    ingest.router,
    requests.router,
    credits.router,
    usage.router,
    subscriptions.router,
    organizations.router,
    billing.router,
    ops.router,
    health.router,
    metrics.router,
)
"""In the order in which their paths are tried: the gate is asked most."""


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
        async with ratelimits.opened(settings) as rate_limits, opened(settings) as resources:
            app.state.rate_limits = rate_limits
            app.state.resources = resources
            app.state.readiness = Readiness(resources)
            # What is there now stays: collections need not look through it again and again.
            gc.collect()
            gc.freeze()
            yield

    app = MeteringApi(
        title="LoopNet Metering",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings),
    )
    answer_errors_of(app)
    for router in ROUTERS:
        # Taken over as they are: a router that is included is matched twice for each request.
        app.router.routes.extend(router.routes)
    if settings.dev_issuer:
        app.router.routes.extend(dev.router.routes)
    return app


class MeteringApi(FastAPI):
    """FastAPI whose document speaks JSON Schema and shows an answer of each operation."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            self.openapi_schema = with_examples(in_its_words(super().openapi()))
        return self.openapi_schema


def _middleware(settings: Settings) -> list[Middleware]:
    """From the outermost to the one next to the routes."""
    origins = allowed_pattern(settings)
    return [
        Middleware(RequestId),
        Middleware(AccessLog),
        Middleware(SecurityHeaders, in_production=settings.env is Environment.PRODUCTION),
        Middleware(RateLimitHeaders),
        Middleware(
            CrossOrigin,
            allow_origin_regex=origins,
            allow_credentials=True,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Content-Type", "Idempotency-Key", "X-Request-ID"],
            expose_headers=[
                "Retry-After",
                "X-RateLimit-Limit",
                "X-RateLimit-Remaining",
                "X-RateLimit-Reset",
                "X-Request-ID",
                "X-Total-Count",
            ],
            max_age=600,
        ),
        Middleware(UnforeseenErrors),
        Middleware(Authentication, allowed_origins=origins),
        Middleware(RateLimit),
        Middleware(
            BodyLimit,
            max_bytes=settings.body_limit_bytes,
            max_bytes_at={USAGE_EVENTS: settings.ingest_body_limit_bytes},
        ),
    ]
