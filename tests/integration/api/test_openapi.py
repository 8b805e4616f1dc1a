"""The OpenAPI document is true: the committed copy is current, and no answer contradicts it."""

import io
import os
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api import openapi
from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.conftest import Callers, Headers
from tests.integration.ledger.world import World

COMMITTED: Final = Path(__file__).parents[3] / "docs" / "openapi.json"
EXAMPLES: Final = int(os.environ.get("OPENAPI_EXAMPLES", "8"))
"""Requests to each operation by each caller; `make test-deep` sends more."""
CHECKS: Final = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

schema: Final = schemathesis.openapi.from_path(COMMITTED)


def test_the_committed_document_is_that_of_the_app() -> None:
    """`make openapi` writes it anew."""
    current = io.StringIO()
    openapi.write(current)
    assert COMMITTED.read_text("utf-8") == current.getvalue()


DOCUMENT: Final = openapi.document()
OPERATIONS: Final = {
    f"{method} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
PLAIN: Final = "application/json"


def resolved(node: Any) -> Any:
    """A part of the document without references to others."""
    match node:
        case {"$ref": str(reference)}:
            return resolved(DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]])
        case dict():
            return {name: resolved(value) for name, value in node.items()}
        case list():
            return [resolved(item) for item in node]
        case _:
            return node


def examples_of(content: dict[str, Any]) -> list[Any]:
    """Examples of a body: beside its schema, in it, or of the items of a list."""
    schema = resolved(content["schema"])
    named = [example["value"] for example in content.get("examples", {}).values()]
    given = [content["example"]] if "example" in content else []
    items = schema.get("items", {}).get("examples", []) if schema.get("type") == "array" else []
    return [*named, *given, *schema.get("examples", []), *([item] for item in items)]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_has_words_and_examples(operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    answers = [
        answer for status, answer in operation["responses"].items() if status.startswith("2")
    ]
    bodies = [operation.get("requestBody", {}), *answers]
    for content in [body["content"][PLAIN] for body in bodies if PLAIN in body.get("content", {})]:
        examples = examples_of(content)
        assert examples
        schema = resolved(content["schema"])
        for example in examples:
            jsonschema_rs.validate(schema, example)


@pytest.fixture(scope="module")
def org_id(api_world: World) -> str:
    roles = {"admin": "admin", "member": "member"}
    made = api_world.organization(
        plan=PlanName.PLATFORM, pool=10**9, allocations={"member": 10**6}, members=roles
    )
    return str(made)


@pytest.fixture(scope="module")
def headers_of(callers: Callers) -> dict[str, Headers]:
    return {
        "anonymous": {},
        "member": callers.user("member"),
        "admin": callers.user("admin"),
        "system_admin": callers.system_admin(),
        "service": callers.service(*Scope),
    }


@pytest.mark.parametrize("caller", ["anonymous", "member", "admin", "system_admin", "service"])
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_no_answer_contradicts_the_document(
    case: Any, caller: str, api: httpx.Client, headers_of: dict[str, Headers], org_id: str
) -> None:
    for parameters in (case.path_parameters, case.query):
        # Random ids are nobody's; what is behind authorization is worth more requests.
        if parameters and isinstance(parameters.get("org_id"), str):
            parameters["org_id"] = org_id
    headers = {name: value for name, value in (case.headers or {}).items() if name != "Cookie"}
    case.headers = headers
    case.cookies = {}
    answer = case.call(base_url=str(api.base_url).rstrip("/"), headers=headers_of[caller])
    case.validate_response(answer, checks=CHECKS)
    if caller == "anonymous" and case.path.startswith("/api/"):
        assert answer.status_code == 401
