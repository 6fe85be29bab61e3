"""Errors with messages for the user, and the packages of haste's extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal

# Optional packages: from the name of the module to the extra that installs it.
EXTRAS = {
    "matplotlib": "plot",
    "scipy": "eval",
    "skimage": "eval",
    "sklearn": "digits",
    "datasets": "datasets",
}
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml"}  # on PyPI


class UserError(ValueError):
    """An invalid setting, file or combination; the message is one sentence that names it and what is valid.

    The command line prints the sentence without a traceback. In Python it is a ValueError.
    """


OnBadFile = Literal["refuse", "skip"]


class BadFile(Exception):
    """A file that is missing, truncated or of the wrong kind. Can be pickled, to be passed on by worker processes."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"

    def as_user_error(self) -> UserError:
        """The error of a command without --on-bad-file skip."""
        return UserError(f"{self}; replace it, or skip such files with --on-bad-file skip")


def in_one_line(error: Exception) -> str:
    """The message of another library's error, for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def shorten(value: object) -> str:
    """A value for a sentence: on one line, at most 40 characters."""
    if isinstance(value, int) and abs(value) >= 10**30:  # str() may refuse it
        return "an integer of more than 30 digits"
    text = str(value)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 40 else text[:37] + "..."


def missing_package(module: str) -> str:
    """The message for a module that is not installed: names the package and the extra."""
    top = module.partition(".")[0]
    if top in EXTRAS:
        return f"the package {PACKAGES.get(top, top)} is not installed: run `pip install 'haste[{EXTRAS[top]}]'`"
    return f"the package {PACKAGES.get(top, top)} is not installed: install it, or haste without --no-deps"


def require(module: str) -> Any:
    """Import a module of an optional package. Raises UserError, which names the extra, if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # a dependency of the package is missing
        raise UserError(missing_package(module)) from error


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package that imports names at first use; `homes` maps each to its module in the package."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return __getattr__
