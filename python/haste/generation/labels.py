"""Which class a picture shows, and the random numbers that are its own: functions of its seed and number alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from haste.errors import UserError, in_one_line, shorten
from haste.io import read_bytes

LARGEST_FILE = 2**28  # bytes of a file of labels: a class for each of some 50 million pictures

if TYPE_CHECKING:  # flags are checked without torch
    import torch


def picture_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator that belongs to picture `index` of `seed` alone."""
    import torch

    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of these pictures under a --labels policy. Raises UserError for a bad policy."""
    if policy == "random":
        import torch

        draws = [torch.randint(num_classes, (), generator=picture_generator(seed, i, "label")) for i in indices]
        return np.array([int(draw) for draw in draws], dtype=np.int64)
    listed = list(range(num_classes)) if policy == "balanced" else _listed_classes(policy)
    unknown = [label for label in listed if not 0 <= label < num_classes]
    if unknown:
        known = f"this model knows the classes 0 to {num_classes - 1}"
        raise UserError(f"--labels is {shorten(policy)} and has {shorten(unknown[0])}; {known}")
    return np.array(listed, dtype=np.int64)[np.asarray(indices) % len(listed)]


def _listed_classes(policy: str) -> list[int]:
    try:
        if not policy.isascii():  # int() reads the digits of other scripts
            raise ValueError
        return [int(word) for word in policy.split(",")]
    except ValueError:
        raise UserError(
            f"--labels must be random, balanced, classes such as 3,1,4, or a file of them, got {shorten(policy)}"
        ) from None


def list_labels(policy: str) -> str:
    """The policy itself; in place of a file's name, the classes that stand on its lines, as 3,1,4."""
    path = _as_file(policy)
    if path is None:
        return policy
    try:
        lines = read_bytes(path, LARGEST_FILE).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels is {policy}, which cannot be read as text: {in_one_line(error)}") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in filled:
        if not (line.isascii() and line.isdecimal()):
            raise UserError(f"--labels is {policy}, whose line {number} is {shorten(line)}; it must be a class as 3")
    if not filled:
        raise UserError(f"--labels is {policy}, which is empty; it must have one class on each line")
    return ",".join(line for _, line in filled)


def _as_file(policy: str) -> Path | None:
    """The file that a policy names; None if it names none."""
    try:
        path = Path(policy).expanduser()
        return path if len(policy) <= 4096 and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, NUL in it, ~ of an unknown user
        return None
