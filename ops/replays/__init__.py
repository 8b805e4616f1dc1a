"""Replay: files of real usage through the queue, with an account of every row.

`mappingfile` reads how columns become event fields, `traces` reads the rows, `replay` sends them
and waits, `report` says what became of them.
"""
