"""The error whose message is meant for the person who typed the command."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done; the message is one sentence that says what, and what would do.

    The command line prints the sentence alone, without a traceback. For a caller from Python it is a ValueError.
    """


def in_one_line(error: Exception) -> str:
    """What another library's error says, fit for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def shorten(value: object) -> str:
    """A value as it is shown in a sentence: on one line, and a list of 50,000 labels by its beginning."""
    if isinstance(value, int) and abs(value) >= 10**30:  # which str() may refuse to write out
        return "an integer of more than 30 digits"
    text = str(value)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 40 else text[:37] + "..."
