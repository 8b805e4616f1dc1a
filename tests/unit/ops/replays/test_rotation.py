"""Rotation: whose turn it is."""

import pytest

from ops.replays.rotation import Rotation


def test_the_rotation_is_smooth_and_fair() -> None:
    rotation = Rotation({"a": 5, "b": 1, "c": 1, "d": 0})
    assert "".join(rotation.next() for _ in range(14)) == "aabacaa" * 2
    even = Rotation({"a": 0, "b": 0})
    assert [even.next() for _ in range(4)] == ["a", "b", "a", "b"]


def test_nobody_has_no_turn() -> None:
    with pytest.raises(ValueError, match="empty"):
        Rotation({}).next()
