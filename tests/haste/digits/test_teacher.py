from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from haste.digits import load_digits
from haste.digits import teacher as digits_module
from haste.digits.teacher import TeacherConfig, augment, prepare, train_teacher
from haste.teachers import VisionTeacher

QUICK = TeacherConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2, steps=2)


def test_the_teacher_is_trained_once_and_loads_like_any_other(tmp_path, monkeypatch):
    folder = prepare(tmp_path, QUICK)
    assert folder.parent == tmp_path and folder.name.startswith("digits-vit-")
    monkeypatch.setattr(digits_module, "train_teacher", lambda settings: pytest.fail("trained a second time"))
    assert prepare(tmp_path, QUICK) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    teacher = VisionTeacher.from_pretrained(str(folder), layers=[0, 1], grid=4)
    images = load_digits()[0][:3]
    assert torch.equal(teacher.preprocess(images), images)  # it was trained on pixels between -1 and 1
    output = teacher(images)
    assert output.queries_keys[0][0].shape == (3, 2, 1 + 16, 8)
    assert output.patch_tokens.shape == (3, 16, 16)


def test_other_settings_are_another_teacher(tmp_path):
    first = prepare(tmp_path, QUICK)
    second = prepare(tmp_path, replace(QUICK, seed=1))
    assert first != second and second.is_dir()


def test_training_is_reproducible_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = train_teacher(QUICK).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    second = train_teacher(QUICK).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_learns_to_read():
    settings = replace(QUICK, hidden_size=32, steps=120)
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
