"""Mapping files: TOML documents that say how the rows of a CSV file become usage events.

`[event]` names, for fields of the event contract (contract.md §1), where each value comes from;
`[event.metadata]` does so for any metadata key::

    [csv]                       # optional
    delimiter = ";"             # one character, "," unless given
    encoding = "latin-1"        # UTF-8 unless given

    [event]
    service_type = "llm"                                      # a constant
    user_id = { column = "User" }                             # a column
    quantity = { formula = '("Prompt Tokens" + Output) / 1000' }
    request_id = { template = "{Region}:{Call ID}" }          # text around columns
    occurred_at = { column = "Time", format = "%d.%m.%Y %H:%M:%S.%f", timezone = "Europe/Berlin" }
    variant = { column = "Model", optional = true }           # an empty cell leaves the field out
    api_cost = { column = "Cost", default = 0 }               # … or takes this value instead

    [event.metadata]
    region = { column = "Region" }
    batch = { value = { name = "trial", round = 2 } }         # a constant of any form

* An empty cell is an error of its row, unless `optional` or `default` say otherwise; in metadata
  it is left out.
* Formulas know numbers, columns, `+ - * /`, a leading minus and parentheses. A column whose name
  is not a plain word is written in quotes.
* `quantity` is cut off after 24 decimal places, `api_cost` rounded to 6, `credits` rounded up.
* In templates `{FILE}` is the file's name and `{LINE}` the line on which the row ends, the header
  being line 1. Unless mapped, `request_id` is `{FILE}:{LINE}`.
* Times are ISO 8601, or as `format` says in the words of `strptime`, or `format = "unix"` for
  seconds since 1970. Those without an offset are in `timezone`, UTC unless given. Digits beyond
  microseconds are cut off.

Nothing here is evaluated as Python, and nothing but the two loaders reads files.
"""

import codecs
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

from ops.replays.conversions import CONVERTERS, Converter, TimeFormat, as_json_value, as_text
from ops.replays.mapping import EventMapping, Field
from ops.replays.sources import SOURCES
from schema.errors import ConfigurationError
from schema.events import UsageEvent

_OPTIONS: Final = ("default", "optional", "format", "timezone")
_DEFAULT_REQUEST_ID: Final = "{FILE}:{LINE}"


def parse_mapping(text: str) -> EventMapping:
    """Read a mapping.

    Raises:
        ConfigurationError: it is not TOML, or something in it is not as this module says.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"not TOML: {error}") from None
    _only(document, ("event", "csv"), "section")
    event = _table(document.get("event"), "event")
    metadata = _table(event.pop("metadata", {}), "event.metadata")
    event.setdefault("request_id", {"template": _DEFAULT_REQUEST_ID})
    if "service_type" not in event:
        raise ConfigurationError("event.service_type is missing: give a constant or a column")
    known = UsageEvent.model_fields.keys() - {"metadata"}
    _only(event, sorted(known), "event field")
    return EventMapping(
        {name: _field(name, entry) for name, entry in event.items()},
        {name: _metadata_field(name, entry) for name, entry in metadata.items()},
        **_csv_options(_table(document.get("csv", {}), "csv")),
    )


def load_mapping(path: Path) -> EventMapping:
    """Read the mapping in a file.

    Raises:
        ConfigurationError: the file cannot be read, or is not a mapping.
    """
    try:
        return parse_mapping(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def load_preset(name: str) -> EventMapping:
    """Read a mapping that comes with the product.

    Raises:
        ConfigurationError: there is none of this name.
    """
    found = {
        entry.name.removesuffix(".toml"): entry
        for entry in files("ops.replays").joinpath("presets").iterdir()
        if entry.name.endswith(".toml")
    }
    if name not in found:
        raise ConfigurationError(f"no preset {name!r}; there is: {', '.join(sorted(found))}")
    return parse_mapping(found[name].read_text("utf-8"))


def _field(name: str, entry: object) -> Field:
    entry = entry if isinstance(entry, dict) else {"value": entry}
    convert = CONVERTERS.get(name, as_text)
    if isinstance(convert, TimeFormat):
        convert = _time_format(name, entry)
    return _sourced(name, entry, convert, optional=False)


def _metadata_field(name: str, entry: object) -> Field:
    entry = entry if isinstance(entry, dict) else {"value": entry}
    return _sourced(f"metadata.{name}", entry, as_json_value, optional=True)


def _sourced(
    name: str,
    entry: Mapping[str, Any],
    convert: Converter,
    *,
    optional: bool,
) -> Field:
    kinds = [kind for kind in entry if kind in SOURCES]
    _only(entry, (*SOURCES, *_OPTIONS), f"option of {name}:")
    if len(kinds) != 1:
        raise ConfigurationError(f"{name} needs one of column, formula, template and value")
    (kind,) = kinds
    given = entry[kind]
    if kind != "value" and not (isinstance(given, str) and given.strip()):
        raise ConfigurationError(f"{name}: {kind} must be a text")
    if not isinstance(entry.get("optional", False), bool):
        raise ConfigurationError(f"{name}: optional must be true or false")
    if convert is not as_json_value and isinstance(given, dict | list):
        raise ConfigurationError(f"{name}: a constant must be a text, a number or a time")
    if entry.keys() & {"format", "timezone"} and not isinstance(convert, TimeFormat):
        raise ConfigurationError(f"{name}: format and timezone are for occurred_at only")
    return Field(
        name,
        SOURCES[kind](given),
        convert,
        optional=entry.get("optional", optional),
        default=entry.get("default"),
    )


def _time_format(name: str, entry: Mapping[str, Any]) -> TimeFormat:
    zone = entry.get("timezone", "UTC")
    written = entry.get("format")
    if written is not None and not isinstance(written, str):
        raise ConfigurationError(f"{name}: format must be a text")
    try:
        return TimeFormat(written, UTC if zone == "UTC" else ZoneInfo(zone))
    except (KeyError, ValueError, TypeError, OSError):
        raise ConfigurationError(
            f"{name}: no time zone {zone!r}; write one as Europe/Berlin"
        ) from None


def _csv_options(section: Mapping[str, Any]) -> dict[str, Any]:
    _only(section, ("delimiter", "encoding"), "option of csv:")
    delimiter = section.get("delimiter")
    if delimiter is not None and not (isinstance(delimiter, str) and len(delimiter) == 1):
        raise ConfigurationError("csv.delimiter must be one character")
    try:
        codecs.lookup(section.get("encoding", "utf-8"))
    except (LookupError, TypeError):
        raise ConfigurationError(f"csv.encoding: no encoding {section['encoding']!r}") from None
    return dict(section)


def _table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"the mapping needs a table [{name}]")
    return dict(value)


def _only(names: Iterable[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise ConfigurationError(f"unknown {what} {name!r}{hint}")
