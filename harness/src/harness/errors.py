"""The exception that means "the user can mend this" (exit code 2), and name suggestions."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A one-line message: what was found, what was expected, how to mend it. Line ends in what it
    quotes become spaces."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


class Finished(UserError):
    """The result of this very command is there: nothing is left to do (exit code 0)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggestion to append to an error about an unknown name: " Did you mean 'c4'?" or ""."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def one_line(error: Exception) -> str:
    """An exception of another library as the end of a one-line message."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 240 else text[:240] + " ..."
