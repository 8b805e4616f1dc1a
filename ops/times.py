"""Times as people type them on the command line."""

from datetime import datetime

from schema.errors import ConfigurationError


def time_given(option: str, text: str) -> datetime:
    """The moment that an option names.

    Raises:
        ConfigurationError: it is no ISO 8601 time, or has no offset.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ConfigurationError(
            f"{option} takes an ISO 8601 time with offset, such as 2030-01-31T00:00:00+00:00, "
            f"not {text!r}"
        )
    return moment
