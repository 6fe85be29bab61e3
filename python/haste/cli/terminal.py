"""Terminals that are too narrow for tables of flags, or cannot show every letter: `Fréchet` becomes `Frechet` there."""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import unicodedata
from typing import TextIO

PLAIN = {
    "→": "->", "←": "<-", "×": "x", "·": "*", "–": "-", "—": "-", "−": "-", "…": "...", "±": "+-", "≤": "<=", "≥": ">=",
    "≈": "~", "√": "sqrt", "Δ": "Delta", "τ": "tau", "λ": "lambda", "μ": "u", "µ": "u", "σ": "sigma", "‖": "||",
    "“": '"', "”": '"', "‘": "'", "’": "'", "─": "-", "│": "|", "█": "#", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip


NARROWEST = 40  # columns; help does not end below some twenty


def widen() -> None:
    """Let help be laid out for NARROWEST columns at least, whatever COLUMNS or the terminal says."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def accept_any_text() -> None:
    """Let standard output and standard error replace what their encoding lacks, in place of raising.

    Where one is closed, what is printed goes nowhere.
    """
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()
    codecs.register_error("haste.plain", in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="haste.plain")


def nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `codecs`: each letter without its accent, or as PLAIN has it, or a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or without_accent(letter) or "?" for letter in letters), error.end


def without_accent(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
