"""What tests expect of answers."""

from typing import Any

import httpx

Json = dict[str, Any]


def refused(answer: httpx.Response, status: int, code: str) -> Json:
    """The detail of an error answer, its shape checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json()) == {"detail"}
    detail: Json = answer.json()["detail"]
    assert detail["error"] == code
    assert detail["message"]
    assert detail["suggested_action"]
    assert detail["request_id"] == answer.headers["X-Request-ID"]
    return detail
