"""Schemas in the words of JSON Schema, where pydantic has its own."""

from typing import Any


def in_its_words(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    r"""The same schema with patterns that JSON Schema knows: it has neither `\A` nor `\z`."""
    match schema:
        case dict():
            return {
                name: _pattern(value)
                if name == "pattern" and isinstance(value, str)
                else in_its_words(value)
                for name, value in schema.items()
            }
        case list():
            return [in_its_words(item) for item in schema]
        case _:
            return schema


def _pattern(pattern: str) -> str:
    return pattern.replace(r"\A", "^").replace(r"\z", "$")
