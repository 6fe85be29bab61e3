"""Which class a picture shows, and the random numbers that are its own: functions of its seed and number alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from haste.errors import UserError, in_one_line

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
    try:
        listed = np.arange(num_classes) if policy == "balanced" else np.array([int(x) for x in policy.split(",")])
    except ValueError:
        raise UserError(
            f"--labels is {shorten(policy)}; it must be random, balanced, classes such as 3,1,4, or a file of them"
        ) from None
    unknown = listed[(listed < 0) | (listed >= num_classes)]
    if len(unknown):
        raise UserError(
            f"--labels is {shorten(policy)} and has {unknown[0]}; this model knows the classes 0 to {num_classes - 1}"
        )
    return listed[np.asarray(indices) % len(listed)]


def list_labels(policy: str) -> str:
    """The policy itself; in place of a file's name, the classes that stand on its lines, as 3,1,4."""
    path = Path(policy).expanduser()
    if len(policy) > 255 or not path.is_file():
        return policy
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels is {policy}, which cannot be read as text: {in_one_line(error)}") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in filled:
        if not line.isdecimal():
            raise UserError(f"--labels is {policy}, whose line {number} is {shorten(line)}; it must be a class as 3")
    if not filled:
        raise UserError(f"--labels is {policy}, which is empty; it must have one class on each line")
    return ",".join(line for _, line in filled)


def shorten(value: object) -> str:
    """A value as it is shown in a sentence: a list of 50,000 labels by its beginning."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
