"""Whether the tests notice when a safeguard is gone: `python -m tests.mutants [NAME ...]`."""
