"""Which class a picture shows, and the random numbers that are its own: functions of its seed and number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from haste.errors import UserError


def picture_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator that belongs to picture `index` of `seed` alone."""
    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of these pictures under a --labels policy. Raises UserError for a bad policy."""
    if policy == "random":
        draws = [torch.randint(num_classes, (), generator=picture_generator(seed, i, "label")) for i in indices]
        return np.array([int(draw) for draw in draws], dtype=np.int64)
    try:
        listed = np.arange(num_classes) if policy == "balanced" else np.array([int(x) for x in policy.split(",")])
    except ValueError:
        raise UserError(f"--labels is {policy!r}; it must be random, balanced, or classes such as 3,1,4") from None
    if listed.min() < 0 or listed.max() >= num_classes:
        raise UserError(f"--labels is {policy!r}; this model knows the classes 0 to {num_classes - 1}")
    return listed[np.asarray(indices) % len(listed)]
