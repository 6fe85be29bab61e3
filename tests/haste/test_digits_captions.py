"""Captions of the digits: what is measured, the words for it, what is held out, and the reading of samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from haste.data.images import to_uint8
from haste.digits import ClassifierConfig, load_digits, real_digits, train_classifier
from haste.digits.captions import (
    HELD_OUT,
    Look,
    all_prompts,
    asked,
    captioned_digits,
    captions,
    measure,
    read_looks,
    real_thirds,
)
from haste.digits.reader import PARTS, DigitsReader
from haste.errors import UserError

BOLD_SEVEN = Look(7, "right", "bold")


def is_part(said: Look, look: Look) -> bool:
    """Whether all that is said is so."""
    return all(part in (None, whole) for part, whole in zip(said, look, strict=True))


def stroke(shear: float, ink: float = 1.0) -> torch.Tensor:
    """A line through the middle, (1, 1, 8, 8), that moves by `shear` columns to the right per row upwards."""
    image = torch.full((1, 1, 8, 8), -1.0)
    for row in range(1, 7):
        column = 3.5 + shear * (3.5 - row)
        left = int(column)
        image[0, 0, row, left] += 2 * ink * (1 - (column - left))
        image[0, 0, row, left + 1] += 2 * ink * (column - left)
    return image


@pytest.mark.parametrize("shear", [-0.5, -0.1, 0.0, 0.3])
def test_the_shear_of_a_stroke_is_measured(shear):
    (found, ink), (_, half) = measure(torch.cat([stroke(shear), stroke(shear, ink=0.5)]))
    assert found == pytest.approx(shear, abs=1e-6) and ink == pytest.approx(6) and half == pytest.approx(3)


def test_an_empty_image_has_no_slant_and_no_ink():
    assert measure(torch.full((1, 1, 8, 8), -1.0)).tolist() == [[0.0, 0.0]]


def test_the_thirds_divide_the_digits_of_each_kind():
    images, labels = load_digits()
    looks = read_looks(images, labels.numpy())
    for digit in range(10):
        own = [look for look in looks if look.digit == digit]
        for place, word in ((1, "left"), (2, "thin")):
            assert sum(look[place] == word for look in own) == pytest.approx(len(own) / 2, abs=len(own) * 0.02)
    clear = read_looks(images, labels.numpy(), clear=True)
    assert all(is_part(short, look) for short, look in zip(clear, looks, strict=True))
    assert 0.6 < np.mean([look.slant is not None for look in clear]) < 0.7
    assert real_thirds().shape == (10, 3, 2)


def test_every_wording_says_what_it_was_made_of():
    for weight in ("thin", "bold", None):
        for slant in ("left", "right", None):
            look = Look(8, slant, weight)
            assert len(captions(look)) == 4 and all(asked(caption) == look for caption in captions(look))
    assert captions(BOLD_SEVEN) == [
        "a bold seven, leaning right",
        "a heavy handwritten seven, slanted to the right",
        "a handwritten seven, leaning right and bold",
        "the digit seven, heavy, slanted to the right",
    ]
    assert captions(Look(8, None, None))[0] == "an eight"


@pytest.mark.parametrize(
    ("prompt", "look"),
    [
        ("A handwritten SEVEN, slanted", Look(7, "right", None)),
        ("slanted to the left: 4", Look(4, "left", None)),
        ("a dog", Look(None, None, None)),
        ("", Look(None, None, None)),
    ],
)
def test_prompts_in_other_words_are_read(prompt, look):
    assert asked(prompt) == look


def test_nothing_that_is_trained_sees_a_combination_that_is_held_out():
    seen, unseen = captioned_digits(), captioned_digits(held_out=True)
    assert len(seen.images) + len(unseen.images) == 1797
    assert {look.digit for look in unseen.looks} == set(range(10)) and all(look.held_out for look in unseen.looks)
    assert not any(look.held_out for look in seen.looks)
    words = [asked(caption) for own in seen.captions for caption in own]
    assert not any(look.held_out for look in words)
    assert {look[1:] for look in words if look.digit == 3} >= {("left", "thin"), ("right", "bold"), ("left", "bold")}
    assert len(set(HELD_OUT)) == 4  # so each word is seen with most digits


def test_each_image_has_several_captions_that_are_true():
    data = captioned_digits()
    for look, own in zip(data.looks, data.captions, strict=True):
        assert len(own) == len(set(own)) >= 3
        for caption in own:
            assert asked(caption).digit == look.digit and is_part(asked(caption), look)


def test_the_prompts_of_an_evaluation_are_all_combinations():
    prompts = all_prompts()
    looks = Counter(map(asked, prompts))
    assert len(prompts) == len(set(prompts)) == 160 and len(looks) == 40 and set(looks.values()) == {4}
    assert sum(asked(prompt).held_out for prompt in prompts[:40]) == 10


@pytest.fixture(scope="module")
def reader():
    return DigitsReader(train_classifier(ClassifierConfig(epochs=6)))


def test_real_digits_are_read_as_their_captions_say(reader):
    images, labels = load_digits()
    looks = read_looks(images, labels.numpy(), clear=True)
    clear = [number for number, look in enumerate(looks) if None not in look]
    prompts = [captions(looks[number])[number % 4] for number in clear]
    found = reader.read(real_digits()[0][clear], prompts)
    assert found.keys() == reader.rates.keys() and all(rate > 0.9 for rate in found.values())
    assert found["seen_slant"] > 0.98 and found["seen_weight"] > 0.98  # but for digits that are taken for others


def test_what_was_not_asked_for_as_shown_counts_as_a_miss(reader):
    image = real_digits()[0][:1]
    look = reader.looks(image)[0]
    other = "thin" if look.weight == "bold" else "bold"
    found = reader.read(np.concatenate([image, image]), [captions(look)[0], captions(look._replace(weight=other))[0]])
    counted = {name: rate for name, rate in found.items() if rate is not None}
    kinds = {name.rpartition("_")[0] for name in counted}
    assert {part for kind in kinds for part in PARTS if f"{kind}_{part}" in counted} == set(PARTS)
    assert sum(counted[f"{kind}_all"] for kind in kinds) == len(kinds) / 2


def test_parts_are_counted_where_they_are_asked_for(reader):
    images = real_digits()[0][:3]
    found = reader.read(images, ["a handwritten zero", "a one", "a two"])
    assert found["seen_digit"] > 0.5 and found["seen_slant"] is None and found["seen_all"] is None
    assert all(found[f"held_out_{part}"] is None for part in PARTS)
    with pytest.raises(UserError, match="prompts must be 3"):
        reader.read(images, ["a zero"])


def test_blank_samples_are_read_as_something(reader):
    assert len(reader.looks(to_uint8(torch.full((2, 1, 8, 8), -1.0)))) == 2
