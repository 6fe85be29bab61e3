"""Images reach an encoder as its own image processor would hand them over."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from haste.errors import UserError
from haste.teachers import VisionTeacher
from haste.teachers.loading import cut_patches
from torch.nn import functional as F

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZE = {"size": {"height": 16, "width": 16}}

# Those that need no torchvision, with the settings of the published checkpoints, but without cropping. DINOv3's own
# needs it; at the encoder's size it does what ViT's does.
PROCESSORS = {
    "vit": lambda: tf.ViTImageProcessorPil(**SIZE),
    "deit": lambda: tf.DeiTImageProcessorPil(**SIZE, do_center_crop=False, **IMAGENET),
    "dinov2": lambda: tf.BitImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False, **IMAGENET),
    "dinov3": lambda: tf.ViTImageProcessorPil(**SIZE, **IMAGENET),
    "clip": lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False),
    "siglip": lambda: tf.SiglipImageProcessorPil(**SIZE),
    "siglip2_naflex": lambda: tf.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16),
    "mae": lambda: tf.ViTImageProcessorPil(**SIZE, **IMAGENET),
    "ijepa": lambda: tf.ViTImageProcessorPil(**SIZE, **IMAGENET),
}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def as_the_student_sees_it(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("with_file", [True, False])
def test_pixels_are_those_of_the_familys_own_processor(saved, tmp_path, image, with_file):
    family = {"clip_vision": "clip", "dinov2_with_registers": "dinov2"}.get(saved.name, saved.name)
    processor = PROCESSORS[family]()
    folder = shutil.copytree(saved.folder, tmp_path / "teacher")
    if with_file:  # else the family's own numbers are used
        processor.save_pretrained(folder)
    pixels = VisionTeacher.from_pretrained(str(folder)).preprocess(as_the_student_sees_it(image))
    if family == "siglip2_naflex":
        pixels = cut_patches(pixels, 4)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def teacher_with(folder, tmp_path, settings, file_name="preprocessor_config.json"):
    folder = shutil.copytree(folder, tmp_path / "teacher")
    (folder / file_name).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return VisionTeacher.from_pretrained(str(folder))


def test_images_are_resized_bicubically_without_antialiasing_as_repa_does(dinov2_folder, tmp_path):
    teacher = teacher_with(dinov2_folder, tmp_path, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]})
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    resized = F.interpolate((images + 1) / 2, (16, 16), mode="bicubic")
    torch.testing.assert_close(teacher.preprocess(images), (resized - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "file_name", "mean"),
    [
        ({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}, "processor_config.json", [0.1, 0.2, 0.3]),
        ({"image_mean": 0.25}, "preprocessor_config.json", [0.25] * 3),
        ({"image_mean": [0.1, 0.2, 0.3], "do_normalize": False}, "preprocessor_config.json", [0.0] * 3),
        ({"image_mean": None}, "preprocessor_config.json", IMAGENET["image_mean"]),
        ({"image_processor": {}}, "processor_config.json", IMAGENET["image_mean"]),
    ],
)
def test_the_mean_is_read_as_transformers_writes_it(dinov2_folder, tmp_path, settings, file_name, mean):
    teacher = teacher_with(dinov2_folder, tmp_path, settings, file_name)
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(mean))


def test_a_missing_file_is_mentioned(dinov2_folder, caplog):
    with caplog.at_level(logging.INFO):
        VisionTeacher.from_pretrained(str(dinov2_folder))
    assert "has no preprocessor_config.json" in caplog.text


def test_the_default_mean_that_the_hub_gives_for_ijepa_is_not_believed(tmp_path, caplog):
    """The published weights were trained with ImageNet's (facebookresearch/ijepa); their file says 0.5."""
    folder = tmp_path / "ijepa"
    config = tf.IJepaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16)
    tf.IJepaModel(config).save_pretrained(folder)
    tf.ViTImageProcessorPil().save_pretrained(folder)
    with caplog.at_level(logging.INFO):
        teacher = VisionTeacher.from_pretrained(str(folder))
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(IMAGENET["image_mean"]))
    assert "the one it was trained with is used" in caplog.text
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.5] * 3}))
    teacher = VisionTeacher.from_pretrained(str(folder))
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor([0.4] * 3))


def test_grey_images_are_shown_to_a_colour_teacher(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder))
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(teacher(grey).patch_tokens, teacher(grey.expand(1, 3, 16, 16)).patch_tokens)


def test_a_broken_file_is_refused(dinov2_folder, tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json must be the settings of .*, and is no JSON"):
        teacher_with(dinov2_folder, tmp_path, "{")
