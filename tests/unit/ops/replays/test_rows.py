"""Rows: their file names in request ids."""

from ops.replays.rows import file_name_for_ids


def test_the_longest_file_name_still_makes_a_request_id() -> None:
    assert len(f"{file_name_for_ids('x' * 255)}:{10**12}") <= 255


def test_other_characters_become_underscores() -> None:
    assert file_name_for_ids("März (1).csv.gz") == "M_rz__1_.csv.gz"
