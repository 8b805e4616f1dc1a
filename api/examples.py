"""What answers look like: one of each operation, for the OpenAPI document.

`examples.json` holds answers as a running API gave them, by method and path; `tests` see that they
are true to their schemas. Operators' answers have their examples beside their models.
"""

import json
from pathlib import Path
from typing import Any, Final

_ANSWERS: Final = Path(__file__).with_suffix(".json")


def with_examples(document: dict[str, Any]) -> dict[str, Any]:
    """The same OpenAPI document, with an example in each answer that is known.

    Raises:
        KeyError: there is an example of an operation that the document does not have.
    """
    for operation, example in json.loads(_ANSWERS.read_text("utf-8")).items():
        method, path = operation.split(" ", 1)
        responses = document["paths"][path][method.lower()]["responses"]
        success = next(answer for status, answer in responses.items() if status.startswith("2"))
        success["content"]["application/json"]["example"] = example
    return document
