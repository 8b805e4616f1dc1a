"""Bodies that pydantic reads itself, from bytes to model in one step.

FastAPI makes Python objects of a body first and a model of them then. Where every microsecond
counts, a route takes `request`, reads its model here, and declares `described(model)`.
"""

from typing import Any, Final, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MEDIA_TYPE: Final = "application/json"

Model = TypeVar("Model", bound=BaseModel)


def described(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of an operation that takes this model, for the OpenAPI document."""
    return {"required": True, "content": {MEDIA_TYPE: {"schema": model.model_json_schema()}}}


async def read(request: Request, model: type[Model]) -> Model:
    """The model that a request carries.

    Raises:
        RequestValidationError: the body is no JSON of this model, or is not said to be JSON.
        HTTPException: it is too long, or the caller went away before its end.
    """
    body = await raw_body(request)
    if not _is_json(request.headers.get("content-type", "")):
        raise RequestValidationError([{"type": "model_attributes_type", "loc": ("body",)}])
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(
            [{**problem, "loc": ("body", *problem["loc"])} for problem in problems]
        ) from None


async def raw_body(request: Request) -> bytes:
    """The whole body of a request.

    Raises:
        HTTPException: the caller went away before its end, which is no fault of ours.
    """
    try:
        return await request.body()
    except ClientDisconnect:
        raise HTTPException(400) from None


def _is_json(content_type: str) -> bool:
    if content_type == MEDIA_TYPE:
        return True
    kind = content_type.partition(";")[0].strip().lower()
    return kind == MEDIA_TYPE or (kind.startswith("application/") and kind.endswith("+json"))
