from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.teachers import VisionTeacher
from haste.teachers.vision import IMAGENET_MEAN, IMAGENET_STD
from torch.nn import functional as F
from transformers import AutoModel


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


@torch.no_grad()
def eager_reference(folder: Path, pixels: torch.Tensor):
    """The same encoder with transformers' own eager attention, which gives its maps out."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    encoder = getattr(model, "vision_model", model)
    extra = {}
    if encoder.config.model_type == "vit_mae":
        encoder.config.mask_ratio = 0.0
        extra["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    return encoder, encoder(pixels, output_attentions=True, **extra)


def test_queries_and_keys_make_the_encoders_own_attention_maps(saved_family):
    folder, prefix = saved_family
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = VisionTeacher.from_pretrained(str(folder), layers=[2, 0])(images)
    _, reference = eager_reference(folder, normalise(images))
    assert output.prefix == prefix
    for layer, (q, k) in zip([2, 0], output.queries_keys, strict=True):
        assert q.shape == k.shape == (2, 3, prefix + 16, 8)
        maps = (q @ k.mT * 8**-0.5).softmax(-1)
        torch.testing.assert_close(maps, reference.attentions[layer], rtol=1e-4, atol=1e-6)


def test_patch_tokens_are_the_final_normalised_ones(saved_family):
    folder, prefix = saved_family
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = VisionTeacher.from_pretrained(str(folder))(images)
    encoder, reference = eager_reference(folder, normalise(images))
    expected = reference.last_hidden_state
    if encoder.config.model_type == "clip_vision_model":  # this one leaves its norm to the pooler
        expected = encoder.post_layernorm(expected)
    assert output.queries_keys == []
    torch.testing.assert_close(output.patch_tokens, expected[:, prefix:], rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_to_the_students_grid(saved_family):
    folder, prefix = saved_family
    teacher = VisionTeacher.from_pretrained(str(folder), layers=[1], grid=6)
    output = teacher(torch.rand(1, 3, 20, 20))
    assert teacher.image_size == 24
    assert output.queries_keys[0][0].shape == (1, 3, prefix + 36, 8)
    assert output.patch_tokens.shape == (1, 36, 24)


def test_layers_after_the_last_needed_one_do_not_exist_without_features(saved_family):
    folder, _ = saved_family
    images = torch.rand(1, 3, 16, 16)
    full = VisionTeacher.from_pretrained(str(folder), layers=[0, 1])
    short = VisionTeacher.from_pretrained(str(folder), layers=[0, 1], features=False)
    output = short(images)
    assert output.patch_tokens is None
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in full.parameters())
    for (q, k), (full_q, full_k) in zip(output.queries_keys, full(images).queries_keys, strict=True):
        torch.testing.assert_close((q, k), (full_q, full_k))


def test_preprocessing_resizes_bicubically_and_uses_the_folders_mean_and_std(dinov2_folder, tmp_path):
    folder = shutil.copytree(dinov2_folder, tmp_path / "teacher")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    pixels = VisionTeacher.from_pretrained(str(folder)).preprocess(images)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    resized = F.interpolate(images, (16, 16), mode="bicubic")
    torch.testing.assert_close(pixels, ((resized + 1) / 2 - mean) / std, rtol=1e-4, atol=1e-5)


def test_grey_pictures_are_shown_to_a_colour_teacher(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder))
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(teacher(grey).patch_tokens, teacher(grey.expand(1, 3, 16, 16)).patch_tokens)


def test_a_teacher_is_frozen_and_stays_in_eval_mode(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(torch.rand(1, 3, 16, 16, requires_grad=True))
    assert not output.patch_tokens.requires_grad and not output.queries_keys[0][0].requires_grad


def test_dropping_a_teacher_frees_it(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0])
    teacher(torch.rand(1, 3, 16, 16))
    parameters = [weakref.ref(parameter) for parameter in teacher.parameters()]
    del teacher
    gc.collect()
    assert [reference for reference in parameters if reference() is not None] == []


def test_two_teachers_record_apart(dinov2_folder):
    first = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0])
    second = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[1, 2])
    images = torch.rand(1, 3, 16, 16)
    expected = first(images).queries_keys[0][0]
    second(images)
    torch.testing.assert_close(first(images).queries_keys[0][0], expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": [3]}, "asks for layer 3 of the teacher .* which has 3 layers; teacher layers must be 0 to 2"),
        ({"layers": [-1]}, "asks for layer -1"),
        ({"grid": 6, "image_size": 16}, "has 4 x 4 tokens and the student has 6 x 6; --teacher-resolution 24"),
        ({"image_size": 18}, "--teacher-resolution is 18; it must be a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_refused(dinov2_folder, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(dinov2_folder), **arguments)


def test_a_family_that_is_no_vision_transformer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is a 'bert' model; a teacher must be one of .*dinov2"):
        VisionTeacher.from_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(dinov2_folder, tmp_path):
    shutil.copy(dinov2_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionTeacher.from_pretrained(str(tmp_path))


def test_wrong_number_of_channels_is_refused(dinov2_folder):
    with pytest.raises(UserError, match="the pictures have 4 channels and the teacher takes 3"):
        VisionTeacher.from_pretrained(str(dinov2_folder))(torch.rand(1, 4, 16, 16))
