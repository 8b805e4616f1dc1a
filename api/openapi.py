"""`python -m api.openapi`: print the OpenAPI document of the API, as `docs/openapi.json` has it."""

import json
import sys
from typing import Any, TextIO

from api.app import create_app
from schema.settings import Settings


def document() -> dict[str, Any]:
    """The document of an API on default settings; nothing is connected to."""
    return create_app(Settings()).openapi()


def write(target: TextIO) -> None:
    """Write the document so that changes to it can be read line by line."""
    json.dump(document(), target, indent=2, ensure_ascii=False)
    target.write("\n")


if __name__ == "__main__":
    write(sys.stdout)
