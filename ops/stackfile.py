"""`stack.json`: what a running stack tells other commands about itself."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from schema.errors import ConfigurationError
from schema.settings import PREFIX, Settings, load_settings

FILE_NAME: Final = "stack.json"

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where the stack keeps its data.  [default: .metering]"),
]


@dataclass(slots=True)
class StackFile:
    """Addresses and process ids of a stack; credentials are in the URLs, so it is private."""

    database_url: str
    redis_url: str
    broker_url: str
    api_url: str
    shards: int
    pids: dict[str, int] = field(default_factory=dict)

    def write(self, data_dir: Path) -> None:
        """Write the file as a whole or not at all, readable by its owner only."""
        target = data_dir / FILE_NAME
        draft = target.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        draft.replace(target)

    @classmethod
    def read(cls, data_dir: Path) -> "StackFile | None":
        """The stack that runs, or ran, on `data_dir`."""
        try:
            return cls(**json.loads((data_dir / FILE_NAME).read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{data_dir / FILE_NAME} is damaged: {error}") from None


def target_settings(data_dir: Path | None = None) -> Settings:
    """The settings of the stack that a command shall talk to.

    Environment variables win; what they leave open comes from `stack.json` in `data_dir`.

    Raises:
        ConfigurationError: neither names a database and a Redis.
    """
    settings = load_settings(**({"data_dir": data_dir} if data_dir else {}))
    stack = StackFile.read(settings.data_dir)
    found: dict[str, Any] = {"data_dir": settings.data_dir}
    if stack:
        offered = {
            "database_url": stack.database_url,
            "redis_url": stack.redis_url,
            "broker_url": stack.broker_url,
            "shards": stack.shards,
        }
        found |= {k: v for k, v in offered.items() if PREFIX + k.upper() not in os.environ}
    settings = load_settings(**found)
    if not settings.database_url.get_secret_value() or not settings.redis_url.get_secret_value():
        raise ConfigurationError(
            f"no stack is running on {settings.data_dir}: start one with 'metering up', or set "
            "METERING_DATABASE_URL and METERING_REDIS_URL"
        )
    return settings
