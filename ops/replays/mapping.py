"""Mappings: how the rows of a CSV file become usage events. Pure; `mappingfile` reads them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ops.replays.conversions import Converter, as_text
from ops.replays.rows import EmptyCell, Row
from ops.replays.sources import Source
from schema.errors import ConfigurationError, InvalidEvent
from schema.events import UsageEvent


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the event or key of the metadata."""

    name: str
    source: Source
    convert: Converter = as_text
    optional: bool = False
    default: object = None

    def value(self, row: Row) -> object:
        """The value for one row, None where the field is left out, or `InvalidEvent`."""
        try:
            return self.convert(self._found(row))
        except EmptyCell as error:
            if self.optional:
                return None
            raise self._invalid(error) from None
        except ValueError as error:
            raise self._invalid(error) from None

    def _found(self, row: Row) -> object:
        try:
            return self.source.value(row)
        except EmptyCell:
            if self.default is None:
                raise
            return self.default

    def _invalid(self, error: ValueError) -> InvalidEvent:
        return InvalidEvent(f"{self.name}: {error}", fields=[self.name.partition(".")[0]])


@dataclass(frozen=True, slots=True)
class EventMapping:
    """A mapping, read and checked: turns rows into events without any I/O."""

    fields: Mapping[str, Field]
    metadata: Mapping[str, Field] = field(default_factory=dict)
    delimiter: str = ","
    encoding: str = "utf-8-sig"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the mapping reads."""
        every = [*self.fields.values(), *self.metadata.values()]
        return frozenset[str]().union(*(one.source.columns for one in every))

    def require(self, header: Sequence[str]) -> None:
        """Check that a file has every column the mapping reads.

        Raises:
            ConfigurationError: one is missing, or is there twice.
        """
        listed = ", ".join(header[:50])
        for column in sorted(self.columns):
            if column not in header:
                raise ConfigurationError(f"missing column {column!r}; the file has: {listed}")
            if header.count(column) > 1:
                raise ConfigurationError(
                    f"column {column!r} is there twice; the file has: {listed}"
                )

    def given(self, name: str, row: Row) -> Any | None:  # noqa: ANN401 - of the field's type
        """What the row gives for one field, None where it gives nothing, or `InvalidEvent`."""
        if name not in self.fields:
            return None
        row.check()
        return self.fields[name].value(row)

    def event(self, row: Row, **resolved: object) -> UsageEvent:
        """The event of a row; `resolved` are fields that have been decided already.

        Raises:
            InvalidEvent: the row lacks something or breaks a rule; the message names the field.
        """
        row.check()
        wanted = [one for name, one in self.fields.items() if name not in resolved]
        found = dict(_values(wanted, row)) | resolved
        if self.metadata:
            found["metadata"] = dict(_values(self.metadata.values(), row))
        return UsageEvent.of(**found)


def _values(wanted: Iterable[Field], row: Row) -> Iterator[tuple[str, object]]:
    for one in wanted:
        value = one.value(row)
        if value is not None:
            yield one.name.removeprefix("metadata."), value
