"""The error whose message is meant for the person who typed the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal

# The packages that haste does without until they are needed: the extra that brings each, by the name it is imported as.
EXTRAS = {
    "matplotlib": "plot",
    "scipy": "eval",
    "skimage": "eval",
    "sklearn": "digits",
    "datasets": "datasets",
}
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml"}  # by module


class UserError(ValueError):
    """A request that cannot be met; the message is one sentence that names what was asked for, and what would do.

    The command line prints the sentence alone, without a traceback. For a caller from Python it is a ValueError.
    """


OnBadFile = Literal["refuse", "skip"]


class BadFile(Exception):
    """One file that is missing, cut short or of the wrong kind. It travels from worker processes, so it pickles."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"

    def as_user_error(self) -> UserError:
        """The error of a command that may not skip it."""
        return UserError(f"{self}; replace it, or skip such files with --on-bad-file skip")


def in_one_line(error: Exception) -> str:
    """The message of another library's error, fit for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def shorten(value: object) -> str:
    """A value for a sentence: on one line, and a list of 50,000 labels by its beginning."""
    if isinstance(value, int) and abs(value) >= 10**30:  # which str() may refuse to write out
        return "an integer of more than 30 digits"
    text = str(value)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 40 else text[:37] + "..."


def missing_package(module: str) -> str:
    """What to install for a module that is not there."""
    top = module.partition(".")[0]
    if top in EXTRAS:
        return f"the package {PACKAGES.get(top, top)} is not installed: run `pip install 'haste[{EXTRAS[top]}]'`"
    return f"the package {PACKAGES.get(top, top)} is not installed: install it, or haste without --no-deps"


def require(module: str) -> Any:
    """Import a module of one of haste's extras.

    Raises:
        UserError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, and one that it needs is not
        raise UserError(missing_package(module)) from error


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        homes: for each name that it offers, the module of the package that has it.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return __getattr__
