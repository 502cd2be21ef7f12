"""Names that are misspelt, told beside the one that is meant. Imports nothing of the package."""

import difflib
import functools
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like this one, if any is; for names that mean nothing, whatever was meant."""
    return _close(name, tuple(known), 0.7)


def slip_of(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that this one differs from by a slip of the hand; for names that may mean something else."""
    close = _close(name, known, 0.8)
    return close if close and abs(len(close) - len(name)) <= 1 else None


def meant(name: str, known: Collection[str]) -> str:
    """A question that ends a message, where a known name is near; else nothing."""
    near = nearest(name, known)
    return f"; is {near} meant?" if near else ""


@functools.lru_cache(maxsize=4096)
def _close(name: str, known: tuple[str, ...], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff)), None)
