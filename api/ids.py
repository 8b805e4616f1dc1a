"""Ids that nobody has used, and that keep no secret."""

from random import getrandbits
from uuid import UUID


def new_id() -> str:
    """A random UUID.

    From the generator of this process, which a fork seeds anew: the system's own randomness costs
    a call of the kernel, and an id is not to be guarded.
    """
    return str(UUID(int=getrandbits(128), version=4))
