"""Folders of teachers that are none, or that act or ask for too much; their pixels; names of the same teacher."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from haste import io
from haste.errors import UserError
from haste.teachers import VisionTeacher
from haste.teachers.families import FAMILIES, PUBLISHED
from haste.teachers.loading import (
    cut_patches,
    load_config,
    load_normalisation,
    own_resolution,
    resample_table,
    resample_tokens,
    same_teacher,
    shape_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, Dinov2Config


@pytest.fixture
def folder(dinov2_folder, tmp_path) -> Path:
    return Path(shutil.copytree(dinov2_folder, tmp_path / "teacher"))


def change(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size of the teacher .* must be 1 to 65,536, got 0"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": 25}, "by its config.json"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of the teacher .* must be 1 to 1,000, got 1000000000"),
        ({"num_attention_heads": -3}, "num_attention_heads .* got -3"),
        ({"num_channels": None}, "num_channels"),
        ({"patch_size": 0}, "patch_size .* must be 1 to 4,096 pixels, got 0"),
        ({"patch_size": []}, "patch_size"),
        ({"image_size": 10**6}, "image_size .* must be .* got 1000000"),
        ({"hidden_size": 24_000}, r"its config.json asks for [\d,]+ numbers, but its weights .* have \d"),
        ({"layer_norm_eps": "small"}, "cannot be loaded"),
        ({"hidden_act": "no-such-function"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "got quantized"),
        ({"model_type": ["dinov2"]}, "must be a model of one of the families"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder, values, sentence):
    change(folder, **values)
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(folder))


def test_files_that_are_none(folder):
    for content, sentence in (
        ("[]", "a JSON object, got list"),
        ("{", "is no JSON"),
        ("{}", "must be a model of one of the families .* got 'None'"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            VisionTeacher.from_pretrained(str(folder))


def test_weights_that_are_none(folder, dinov2_folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    index = {"metadata": {}, "weight_map": {"a": 3}}
    for content in (whole[: len(whole) // 2], b"", (2**62).to_bytes(8, "little") + whole[8:]):
        weights.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded"):
            VisionTeacher.from_pretrained(str(folder))
    weights.rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionTeacher.from_pretrained(str(folder))


@pytest.mark.parametrize("known", [True, False])
def test_a_program_in_the_folder_does_not_run(folder, tmp_path, monkeypatch, known):
    """Neither of a family that transformers has nor of another, whatever is answered to its question."""
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    change(folder, auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    if known:
        assert VisionTeacher.from_pretrained(str(folder)).width == 24
    else:
        change(folder, model_type="own")
        with pytest.raises(UserError, match="must be a model of one of the families .* got 'own'"):
            VisionTeacher.from_pretrained(str(folder))
    assert not ran.exists()


def test_a_pickle_in_the_weights_does_not_run(folder, tmp_path):
    class Act:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").rename(folder / "kept")
    torch.save({"embeddings.cls_token": Act(), "filling": torch.zeros(100_000)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionTeacher.from_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_without_a_hub_is_told_at_once_by_its_flag(monkeypatch):
    monkeypatch.setattr(io, "is_reachable", lambda: False)
    with pytest.raises(UserError, match="--enc-type must be .* the hub cannot be reached .* got somebody/none"):
        VisionTeacher.from_pretrained("somebody/none")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"image_mean": []}, "image_mean in preprocessor_config.json of the teacher .* must be finite"),
        ({"image_mean": "grey"}, "image_mean of preprocessor_config.json .* must be a number or "),
        ({"image_std": [0.5, 0, 0.5]}, "must be finite and above 0"),
        ({"image_std": float("nan")}, "image_std of preprocessor_config.json .* got nan"),
        ({"do_normalize": "yes"}, "do_normalize of preprocessor_config.json .* must be true or false"),
    ],
)
def test_settings_of_a_processor_that_are_none(tmp_path, values, sentence):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence):
        load_normalisation("x", str(tmp_path), FAMILIES["dinov2"], 3)


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "preprocessor_config.json")
    with pytest.raises(UserError, match="it is a pipe, not a regular file"):
        load_normalisation("x", str(tmp_path), FAMILIES["dinov2"], 3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from([
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size",
    "num_channels", "mlp_ratio", "hidden_act", "architectures", "dtype", "torch_dtype", "layer_norm_eps", "id2label",
    "_attn_implementation", "attn_implementation", "qkv_bias", "transformers_version", "drop_path_rate",
]), VALUES, min_size=1, max_size=2))  # fmt: skip
def test_any_values_in_a_config_are_a_config_or_a_refusal(dinov2_folder, tmp_path, changes):
    for file in dinov2_folder.iterdir():
        if not (tmp_path / file.name).exists():
            shutil.copy(file, tmp_path)
    config = json.loads((dinov2_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with contextlib.suppress(UserError):
        load_config("x", str(tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["do_normalize", "image_mean", "image_std", "image_processor"]), VALUES))
def test_any_values_of_a_processor_are_a_normalisation_or_a_refusal(tmp_path, values):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).write_text(json.dumps(values))
        with contextlib.suppress(UserError):
            mean, std = load_normalisation("x", str(tmp_path), FAMILIES["vit"], 3)
            assert len(mean) == len(std) == 3
        (tmp_path / name).unlink()


# ---- pixels ----

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
    "radio": lambda: tf.ViTImageProcessorPil(**SIZE, do_normalize=False),
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
    assert "using the one that it was trained with" in caplog.text
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.5] * 3}))
    teacher = VisionTeacher.from_pretrained(str(folder))
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor([0.4] * 3))


def test_grey_images_are_shown_to_a_colour_teacher(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder))
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(teacher(grey).patch_tokens, teacher(grey.expand(1, 3, 16, 16)).patch_tokens)


def test_a_broken_file_is_refused(dinov2_folder, tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json must be the settings of .*, but is no JSON"):
        teacher_with(dinov2_folder, tmp_path, "{")


# ---- the same teacher ----


def save_config(config, folder):
    """A teacher's folder, with weights that nobody reads."""
    config.save_pretrained(folder)
    with open(folder / "model.safetensors", "wb") as weights:
        weights.truncate(2**30)
    return folder


@pytest.fixture
def base(tmp_path):
    return save_config(Dinov2Config(image_size=518, patch_size=14), tmp_path / "base")  # the other sizes are B's


def test_a_folder_is_told_by_its_config(base, tmp_path):
    assert shape_of(str(base)) == PUBLISHED["dinov2-vit-b"].shape == shape_of("facebook/dinov2-base")
    assert same_teacher("dinov2-vit-b", str(base)) and same_teacher(str(base), "facebook/dinov2-base")
    assert same_teacher("dinov2-vit-l", str(base)) is False
    clip = save_config(CLIPConfig(), tmp_path / "clip")
    assert shape_of(str(clip)).model_type == "clip_vision_model"


def test_one_folder_may_be_written_in_two_ways(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (base / "config.json").write_text("{}")  # of which no shape could be told
    assert same_teacher("base", str(base)) and same_teacher(f".{os.sep}base", "base")


def test_names_that_nothing_is_known_of_are_their_own(tmp_path):
    assert same_teacher("somebody/vit", "somebody/vit") is True
    assert same_teacher("somebody/vit", "dinov2-vit-b") is False
    assert same_teacher(str(tmp_path / "gone" / "vit"), "dinov2-vit-b") is None


def test_the_size_that_a_teacher_was_made_for(base):
    assert own_resolution("dinov2-vit-b") == own_resolution(str(base)) == 518
    assert own_resolution("somebody/vit") is None


@pytest.mark.parametrize("grid", [2, 5, 9])
def test_tokens_are_resampled_as_an_image_is(grid):
    """Bilinear with antialiasing, as Pillow does it."""
    tokens = torch.randn(2, 3, 16, 5)
    resampled = resample_tokens(tokens, 4, grid)
    assert resampled.shape == (2, 3, grid**2, 5) and resampled.is_contiguous()
    image = Image.fromarray(tokens[1, 2, :, 3].view(4, 4).numpy()).resize((grid, grid), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(image)).flatten()
    torch.testing.assert_close(resampled[1, 2, :, 3], expected, rtol=1e-5, atol=1e-6)


def test_tokens_keep_their_type_and_a_grid_that_fits_keeps_its_tokens():
    tokens = torch.randn(1, 2, 16, 3, dtype=torch.bfloat16)
    assert resample_tokens(tokens, 4, 4) is tokens
    assert resample_tokens(tokens, 4, 3).dtype == torch.bfloat16


def test_a_linear_ramp_of_positions_stays_one_inside_and_the_prefix_stays():
    ramp = torch.arange(8.0).repeat(8, 1).view(64, 1)  # the column's number
    table = torch.cat([torch.tensor([[-1.0], [-2.0]]), ramp])
    resampled = resample_table(table, 8, 16, "bicubic")
    assert resampled.shape == (2 + 256, 1)
    assert resampled[:2].flatten().tolist() == [-1.0, -2.0]
    columns = resampled[2:].view(16, 16)[5, 4:12]
    torch.testing.assert_close(columns, (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5)


def test_patches_run_row_by_row_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = cut_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
