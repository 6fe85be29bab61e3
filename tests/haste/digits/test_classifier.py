from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from haste.digits import classifier as classifier_module
from haste.digits.classifier import ClassifierConfig, load_extractor, real_digits, shift_randomly, train_classifier
from haste.errors import UserError

QUICK = ClassifierConfig(epochs=8)


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(QUICK)


def test_it_learns_to_read_digits_it_has_not_seen(classifier):
    images, labels = real_digits()
    assert np.mean(classifier(images[:100]).predictions == labels[:100]) > 0.9
    assert classifier.held_out_accuracy > 0.9  # after a fifth of its usual training; guessing is 0.1


def test_its_features_have_unit_variance_over_the_real_digits(classifier):
    found = classifier(real_digits()[0])
    assert found.values.shape == (1797, QUICK.features) and found.values.dtype == np.float64
    assert found.values.std(axis=0, ddof=1) == pytest.approx(np.ones(QUICK.features), rel=1e-4)


def test_a_judgement_does_not_depend_on_the_batch(classifier):
    images = real_digits()[0][:600]  # more than one batch
    whole, part = classifier(images), classifier(images[510:520])
    assert whole.values[510:520] == pytest.approx(part.values, abs=1e-4)
    assert (whole.predictions[510:520] == part.predictions).all()


def test_training_is_repeatable_and_leaves_the_random_state_alone(classifier):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = train_classifier(QUICK)
    assert torch.rand(1) == expected
    images = real_digits()[0][:50]
    assert (again(images).values == classifier(images).values).all()


def test_it_is_trained_once_per_settings(tmp_path, monkeypatch):
    trained = []

    def count(settings):
        trained.append(settings)
        return train_classifier(settings)

    monkeypatch.setattr(classifier_module, "train_classifier", count)
    quickest = replace(QUICK, epochs=1)
    first, second = load_extractor(tmp_path, quickest), load_extractor(tmp_path, quickest)
    assert trained == [quickest]
    images = real_digits()[0][:50]
    assert (first(images).values == second(images).values).all()
    assert first.held_out_accuracy == second.held_out_accuracy

    load_extractor(tmp_path, replace(quickest, seed=1))
    assert len(trained) == 2 and len(list(tmp_path.iterdir())) == 2


def test_any_setting_changes_the_digest():
    changed = [replace(QUICK, seed=1), replace(QUICK, epochs=9), replace(QUICK, architecture=2)]
    assert len({settings.digest() for settings in [QUICK, *changed]}) == 4


def test_a_shift_moves_by_at_most_one_pixel_and_brings_in_black():
    torch.manual_seed(0)
    dot = torch.full((200, 1, 8, 8), -1.0)
    dot[:, :, 0, 4] = 1.0
    shifted = shift_randomly(dot)
    places = {tuple(place.tolist()) for image in shifted for place in (image[0] > 0).nonzero()}
    assert places == {(row, column) for row in (0, 1) for column in (3, 4, 5)}
    assert set(shifted.unique().tolist()) == {-1.0, 1.0}
    lost = sum(int((image <= 0).all()) for image in shifted)
    assert 0 < lost < 200  # moved out at the top


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 16, 16, 3), (4, 8, 8, 1)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(UserError, match=r"must be uint8 \(count, 8, 8, 3\)"):
        classifier(np.zeros(shape, dtype=np.uint8))
