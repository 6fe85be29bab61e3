"""Captions of the digits, from their labels and from what is measured of them.

    digit   its label, as a word
    slant   left or right: the shear of the ink, from its second moments
    weight  thin or bold: the amount of ink

Slant and weight are those among the real digits of the same kind, as a seven leans more than a six, and an eight has
more ink than a one. A caption names them where they are in the lowest or the highest third; the median divides what is
read. One combination of both for each digit is held out: what learns from the captions, be it an encoder or a model,
sees no image that is read as it.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.digits import NUM_CLASSES, SIDE, load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SLANTS, WEIGHTS = ("left", "right"), ("thin", "bold")
_TURNS = (("left", "thin"), ("right", "bold"), ("left", "bold"), ("right", "thin"))

HELD_OUT = tuple(_TURNS[digit % len(_TURNS)] for digit in range(NUM_CLASSES))
"""Slant and weight, for each digit, of which nothing that is trained sees an image."""


class Look(NamedTuple):
    """How a digit is written, or what a prompt asks for. None: not said."""

    digit: int | None
    slant: str | None
    weight: str | None

    @property
    def held_out(self) -> bool:
        """Whether it is the combination of the digit that is held out."""
        return self.digit is not None and HELD_OUT[self.digit] == (self.slant, self.weight)


# ---- what is measured ----


def measure(images: Tensor) -> np.ndarray:
    """Slant and amount of ink of each image.

    Args:
        images: (N, 1, 8, 8), ink = 1 on paper = -1.

    Returns:
        (N, 2) float64: the shear, columns to the right per row upwards, −μ₁₁/μ₂₀ with the central moments of the ink,
        rows first; and the ink, from 0 to 64 pixels. An image without ink has no shear, 0.
    """
    ink = ((images[:, 0].double() + 1) / 2).clamp(0, 1)
    total = ink.sum(dim=(1, 2)).clamp_min(1e-9)
    place = torch.arange(SIDE, dtype=torch.float64)
    down = place[:, None] - ((ink.sum(dim=2) * place).sum(dim=1) / total)[:, None, None]
    across = place - ((ink.sum(dim=1) * place).sum(dim=1) / total)[:, None, None]
    covariance, variance = ((ink * down * other).sum(dim=(1, 2)) / total for other in (across, down))
    return torch.stack([-covariance / variance.clamp_min(1e-9), ink.sum(dim=(1, 2))], dim=1).numpy()


@cache
def real_thirds() -> np.ndarray:
    """The lower third, the median and the upper third of both measurements of the real digits, (10, 3, 2)."""
    images, labels = load_digits()
    measured = measure(images)
    own = [measured[labels.numpy() == digit] for digit in range(NUM_CLASSES)]
    return np.stack([np.quantile(values, (1 / 3, 1 / 2, 2 / 3), axis=0) for values in own])


def read_looks(images: Tensor, digits: np.ndarray, clear: bool = False) -> list[Look]:
    """How images (N, 1, 8, 8) are written that show these digits (N,).

    clear: leave out what is in the middle third, which is not worth a word.
    """
    measured, thirds = measure(images), real_thirds()[digits]
    high = measured >= thirds[:, 1]
    named = (measured < thirds[:, 0]) | (measured >= thirds[:, 2]) | (not clear)
    slants, weights = (
        [words[place] if said else None for place, said in zip(high[:, part].astype(int), named[:, part], strict=True)]
        for part, words in enumerate((SLANTS, WEIGHTS))
    )
    return [Look(*parts) for parts in zip(digits.tolist(), slants, weights, strict=True)]


# ---- words ----

_WORDS = {
    "left": ("leaning left", "slanted to the left"),
    "right": ("leaning right", "slanted to the right"),
    "thin": ("thin", "light"),
    "bold": ("bold", "heavy"),
}
_MEANING = {
    **{word: ("digit", digit) for digit, word in enumerate(DIGITS)},
    **{str(digit): ("digit", digit) for digit in range(NUM_CLASSES)},
    **{word: ("slant", word) for word in SLANTS},
    **{word: ("weight", weight) for weight in WEIGHTS for word in _WORDS[weight]},
}


def captions(look: Look) -> list[str]:
    """Four wordings that say all of a look: of a bold seven that leans right

    a bold seven, leaning right
    a heavy handwritten seven, slanted to the right
    a handwritten seven, leaning right and bold
    the digit seven, heavy, slanted to the right
    """
    digit = DIGITS[look.digit or 0]
    (slant, other_slant), (weight, other_weight) = (
        _WORDS[word] if word is not None else ("", "") for word in (look.slant, look.weight)
    )
    both = " and ".join(filter(None, (slant, weight)))
    parts = [
        [f"a {weight} {digit}", slant],
        [f"a {other_weight} handwritten {digit}", other_slant],
        [f"a handwritten {digit}", both],
        [f"the digit {digit}", other_weight, other_slant],
    ]
    return [_tidy(", ".join(filter(None, part))) for part in parts]


def _tidy(caption: str) -> str:
    """One space between words, and "an" before a vowel."""
    return re.sub(r"\ba (?=e)", "an ", re.sub(" +", " ", caption))


def asked(prompt: str) -> Look:
    """What a prompt asks for, by its words; "slanted" alone is to the right."""
    words = re.findall(r"\w+", prompt.lower())
    found: dict[str, Any] = dict(_MEANING[word] for word in words if word in _MEANING)
    if "slanted" in words:
        found.setdefault("slant", "right")
    return Look(*(found.get(name) for name in Look._fields))


def all_prompts() -> list[str]:
    """Every wording for every combination of digit, slant and weight, 160; the held-out ones are spread among them."""
    looks = [Look(digit, *both) for both in product(SLANTS, WEIGHTS) for digit in range(NUM_CLASSES)]
    return [captions(look)[wording] for wording in range(4) for look in looks]


# ---- the images with their captions ----


class Captioned(NamedTuple):
    """Digits (N, 1, 8, 8) float32 in [-1, 1], how each is read, and its captions."""

    images: Tensor
    looks: list[Look]
    captions: list[list[str]]


def captioned_digits(held_out: bool = False) -> Captioned:
    """All digits but those that are read as a combination that is held out, or these alone.

    Each has four captions of all that is worth a word, and up to two that leave the slant or the weight out.
    """
    images, labels = load_digits()
    looks = read_looks(images, labels.numpy())
    chosen = [number for number, look in enumerate(looks) if look.held_out == held_out]
    named = read_looks(images[chosen], labels[chosen].numpy(), clear=True)
    some = [[captions(look._replace(**{part: None}))[0] for part in ("slant", "weight")] for look in named]
    every = [list(dict.fromkeys(captions(look) + fewer)) for look, fewer in zip(named, some, strict=True)]
    return Captioned(images[chosen], [looks[number] for number in chosen], every)
