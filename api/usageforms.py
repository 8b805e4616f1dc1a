"""The forms of a usage report in the OpenAPI document: schemas and examples per media type."""

from collections.abc import Mapping
from typing import Any, Final

from api import cloudevents
from api.usagebodies import MAX_EVENTS, PLAIN
from schema.events import UsageEvent

Document = dict[str, Any]

_EVENT: Final[Document] = {
    "request_id": "req-7f3a",
    "org_id": "0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d",
    "user_id": "8c1f2d5e-ada",
    "service_type": "company_enrichment",
    "variant": "full",
    "api_cost": "0.04",
    "occurred_at": "2026-03-15T12:30:00Z",
    "metadata": {"operation": "enrich", "company_id": "c-42"},
}
_ATTRIBUTES: Final = ("request_id", "occurred_at", "source", "traceparent")
_CLOUD_EVENT: Final[Document] = {
    "specversion": cloudevents.SPECIFICATION,
    "type": cloudevents.TYPE,
    "id": _EVENT["request_id"],
    "source": "/loopnet/enrichment",
    "time": _EVENT["occurred_at"],
    "data": {name: value for name, value in _EVENT.items() if name not in _ATTRIBUTES},
}


def request_body() -> Document:
    """What the body of a report may be."""
    event, cloud_event = _event_schema(), _cloud_event_schema()
    one_or_several = {"oneOf": [event, _several(event)]}
    return {
        "required": True,
        "content": {
            PLAIN: {
                "schema": one_or_several,
                "examples": {
                    "one event": {"value": _EVENT},
                    "several events": {"value": [_EVENT, _EVENT | {"request_id": "req-7f3b"}]},
                },
            },
            cloudevents.STRUCTURED: {"schema": cloud_event, "example": _CLOUD_EVENT},
            cloudevents.BATCH: {
                "schema": _several(cloud_event),
                "example": [_CLOUD_EVENT, _CLOUD_EVENT | {"id": "req-7f3b"}],
            },
        },
    }


def _several(schema: Document) -> Document:
    anything = {"description": "Anything else is rejected, and its neighbours are not."}
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_EVENTS,
        "items": {"anyOf": [schema, anything]},
    }


def _event_schema() -> Document:
    """The schema of `UsageEvent`, for people who send it and without references."""
    schema = UsageEvent.model_json_schema()
    definitions = schema.pop("$defs")
    schema["description"] = "One successful operation, to be charged once."
    return {name: _resolved(value, definitions) for name, value in schema.items()}


def _cloud_event_schema() -> Document:
    event = _event_schema()
    fields = event["properties"]
    data = event | {
        "description": "The fields that no attribute tells; one that does must say the same.",
        "required": [name for name in event["required"] if name not in _ATTRIBUTES],
    }
    return {
        "title": "CloudEvent",
        "description": "A usage event as CloudEvents 1.0. Other attributes are ignored.",
        "type": "object",
        "properties": {
            "specversion": {"const": cloudevents.SPECIFICATION},
            "type": {"const": cloudevents.TYPE},
            "id": fields["request_id"] | {"description": "The request id."},
            "source": fields["source"] | {"format": "uri-reference"},
            "time": fields["occurred_at"] | {"description": "When the operation succeeded."},
            "traceparent": fields["traceparent"],
            "datacontenttype": {"type": "string", "default": PLAIN},
            "data": data,
            "data_base64": {"type": "string", "contentEncoding": "base64"},
        },
        "required": ["specversion", "type", "id", "source"],
        "oneOf": [{"required": ["data"]}, {"required": ["data_base64"]}],
    }


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    match schema:
        case {"$ref": str(reference), **others}:
            return definitions[reference.rpartition("/")[2]] | others
        case dict():
            return {name: _resolved(value, definitions) for name, value in schema.items()}
        case list():
            return [_resolved(item, definitions) for item in schema]
        case _:
            return schema
