"""Sources: where they find a value, and the templates that are refused."""

import pytest

from ops.replays.rows import EmptyCell, Row
from ops.replays.sources import Column, Constant, Template
from schema.errors import ConfigurationError

ROW = Row("calls.csv", 7, {"Region": " eu ", "Call ID": "17", "Void": " "})


def test_constants_are_the_same_for_every_row() -> None:
    batch = {"name": "trial"}
    assert Constant(batch).value(ROW) is batch
    assert not Constant(batch).columns


def test_columns_give_their_cell_without_the_space_around_it() -> None:
    assert Column("Region").value(ROW) == "eu"
    assert Column("Region").columns == {"Region"}
    with pytest.raises(EmptyCell, match="column 'Void' is empty"):
        Column("Void").value(ROW)
    with pytest.raises(ValueError, match="there is no column 'Gone'"):
        Column("Gone").value(ROW)


def test_templates_know_the_place_of_the_row() -> None:
    template = Template("{Region}/{Call ID} {{{FILE}:{LINE}}}")
    assert template.value(ROW) == "eu/17 {calls.csv:7}"
    assert template.columns == {"Region", "Call ID"}


@pytest.mark.parametrize("text", ["{a", "{}", "{a:>3}", "{a!r}"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^template "):
        Template(text)
