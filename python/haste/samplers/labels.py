"""The labels of images, and the random generator that each image has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from haste.errors import UserError, shorten

NONE = "none"  # the policy for images of no class
POLICIES = ("random", "balanced")  # those for all classes
UNLABELLED = -1  # the label of such an image


def image_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator of image `index` of `seed`."""
    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of images under a --labels policy; UNLABELLED for "none".

    Raises:
        UserError: an invalid policy.
    """
    if policy == NONE:
        return np.full(len(indices), UNLABELLED, dtype=np.int64)
    if policy == "random":
        chosen = [torch.randint(num_classes, (), generator=image_generator(seed, i, "label")) for i in indices]
        return np.array([int(label) for label in chosen], dtype=np.int64)
    listed = list(range(num_classes)) if policy == "balanced" else _listed_classes(policy)
    unknown = [label for label in listed if not 0 <= label < num_classes]
    if unknown:
        found = f"{shorten(unknown[0])} in {shorten(policy)}"
        raise UserError(f"--labels must be classes from 0 to {num_classes - 1}, got {found}")
    return np.array(listed, dtype=np.int64)[np.asarray(indices) % len(listed)]


def number_labels(policy: str, names: Sequence[str]) -> str:
    """A --labels policy with the names of classes replaced by their numbers: 'cat,dog' as '3,5'."""
    numbers = {name: str(number) for number, name in enumerate(names)}
    words = [word.strip() for word in policy.split(",")]
    if policy in (NONE, *POLICIES) or not any(word in numbers and not word.isdecimal() for word in words):
        return policy
    return ",".join(word if word.isdecimal() else numbers.get(word, word) for word in words)


def _listed_classes(policy: str) -> list[int]:
    try:
        if not policy.isascii():  # int() reads the digits of other scripts
            raise ValueError
        return [int(word) for word in policy.split(",")]
    except ValueError:
        raise UserError(
            f"--labels must be random, balanced, none, classes such as 3,1,4, or a file of them, got {shorten(policy)}"
        ) from None
