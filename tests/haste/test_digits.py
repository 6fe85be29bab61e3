"""The digits: the data set, the teacher and the classifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from haste import digits
from haste.digits import (
    ClassifierConfig,
    Teacher,
    TeacherConfig,
    augment,
    load_digits,
    load_extractor,
    real_digits,
    shift_randomly,
    train_classifier,
    train_teacher,
)
from haste.errors import UserError
from haste.teachers import VisionTeacher
from sklearn import datasets

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

    monkeypatch.setattr(digits, "train_classifier", count)
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


def test_the_digits_are_scikit_learns_between_minus_one_and_one():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    source = datasets.load_digits()
    assert ((images[7, 0] + 1) * 8).tolist() == source.images[7].tolist()
    assert labels.tolist() == source.target.tolist()


SMALL = TeacherConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2, steps=2)


def test_the_teacher_is_trained_once_and_loads_like_any_other(tmp_path, monkeypatch):
    folder = Teacher.prepare(tmp_path, SMALL)
    assert folder.parent == tmp_path and folder.name.startswith("digits-vit-")
    monkeypatch.setattr(digits, "train_teacher", lambda settings: pytest.fail("trained a second time"))
    assert Teacher.prepare(tmp_path, SMALL) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    teacher = VisionTeacher.from_pretrained(str(folder), layers=[0, 1], grid=4)
    images = load_digits()[0][:3]
    assert torch.equal(teacher.preprocess(images), images)  # it was trained on pixels between -1 and 1
    output = teacher(images)
    assert output.queries_keys[0][0].shape == (3, 2, 1 + 16, 8)
    assert output.patch_tokens.shape == (3, 16, 16)


def test_other_settings_are_another_teacher(tmp_path):
    first = Teacher.prepare(tmp_path, SMALL)
    second = Teacher.prepare(tmp_path, replace(SMALL, seed=1))
    assert first != second and second.is_dir()


def test_training_is_reproducible_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = train_teacher(SMALL).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    second = train_teacher(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_learns_to_read():
    settings = replace(SMALL, hidden_size=32, steps=120)
    model = train_teacher(settings)
    images, labels = load_digits()
    with torch.no_grad():
        accuracy = (model(images).logits.argmax(-1) == labels).float().mean().item()
    assert accuracy > 0.5  # guessing is right one time in ten


def test_augmentation_shifts_by_at_most_a_pixel_over_paper():
    torch.manual_seed(0)
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 4, 4] = 1.0
    shifted = augment(image.expand(200, -1, -1, -1), noise=0.0)
    ink = (shifted[:, 0] == 1).nonzero()
    assert len(ink) == 200 and (shifted == -1).sum() == 200 * 63
    assert set(map(tuple, ink[:, 1:].tolist())) == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_augmentation_noise_has_the_given_size():
    torch.manual_seed(0)
    noisy = augment(torch.full((500, 1, 8, 8), -1.0), noise=0.3)
    assert noisy.mean().item() == pytest.approx(-1, abs=0.01)
    assert noisy.std().item() == pytest.approx(0.3, abs=0.01)
