"""The record of one fix."""

from typing import NamedTuple

__all__ = ['Change']


class Change(NamedTuple):
    """What one fix changed in this process, in words for a user.

    Attributes:
        name: What is mended.
        cause: What is broken in this environment, and since when.
        action: What was done about it.
        cure: What the user can do to need the fix no more.
    """

    name: str
    cause: str
    action: str
    cure: str
