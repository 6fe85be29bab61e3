"""Reads on a sample what its prompt asked for: the digit by the classifier, slant and weight by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from haste.digits import Classifier, load_extractor, to_network_input
from haste.digits.captions import Look, all_prompts, asked, read_looks
from haste.errors import UserError
from haste.metrics.features import Features

PARTS = (*Look._fields, "all")


class DigitsReader:
    """The classifier of the digits, as an extractor of features, with the prompts of an evaluation and their reading.

    Attributes:
        prompts: every wording of every combination; image i of an evaluation has prompt i modulo their number.
        rates: what `read` returns, with a title for each.
    """

    classes: int | None = None  # images have prompts, not labels
    rates = {f"{kind}_{part}": f"{part}, {kind.replace('_', ' ')}" for kind in ("seen", "held_out") for part in PARTS}

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.held_out_accuracy = classifier.held_out_accuracy
        self.settings = classifier.settings
        self.key, self.dimension = classifier.key, classifier.dimension
        self.prompts = all_prompts()

    def describe(self) -> str:
        return self.classifier.describe()

    def __call__(self, images: np.ndarray) -> Features:
        """Features of images (N, 8, 8, 3) uint8, and the probabilities of the digits."""
        return self.classifier(images)

    def looks(self, images: np.ndarray) -> list[Look]:
        """How images (N, 8, 8, 3) uint8 are written: slant and weight are among the real digits of what they are read
        as."""
        return read_looks(to_network_input(images), self(images).predictions)

    def read(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
        """How often images show what was asked for.

        Args:
            images: (N, 8, 8, 3) uint8.
            prompts: one for each.

        Returns:
            By the keys of `rates`, from 0 to 1: for prompts of combinations that training has seen and for those that
            it has not, each part among the prompts that name it, and all three among those that name all; None where
            there is no such prompt.
        """
        if len(images) != len(prompts):
            raise UserError(f"prompts must be {len(images)}, one for each image, got {len(prompts)}")
        wanted, found = [asked(prompt) for prompt in prompts], self.looks(images)
        shares: dict[str, float | None] = {}
        for kind, held_out in (("seen", False), ("held_out", True)):
            pairs = [pair for pair in zip(wanted, found, strict=True) if pair[0].held_out == held_out]
            for place, part in enumerate(Look._fields):
                shares[f"{kind}_{part}"] = _share([w[place] == f[place] for w, f in pairs if w[place] is not None])
            shares[f"{kind}_all"] = _share([w == f for w, f in pairs if None not in w])
        return shares


def _share(hits: list[bool]) -> float | None:
    return float(np.mean(hits)) if hits else None


def load_reader(cache: Path) -> DigitsReader:
    """The reader with the classifier of the folder `cache`, which is trained first if it is missing."""
    return DigitsReader(load_extractor(cache))
