"""A teacher against transformers' own eager run of the same folder, for every family."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.teachers import VisionTeacher, encoder
from haste.teachers.loading import resample_tokens
from PIL import Image
from transformers import AutoConfig, AutoModel, Dinov2Model


def random_images(size=16, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vision_tower(model):
    return getattr(model, "vision_model", model)


@torch.no_grad()
def run_eager(encoder, pixels):
    """The maps of every layer and the last tokens. For MAE those before its final norm, as in REPA."""
    config = encoder.config
    inputs, before_norm = {"pixel_values": pixels}, []
    if config.model_type == "siglip2_vision_model":  # patches row by row, channels last within each
        grid = pixels.shape[-1] // 4
        blocks = [pixels[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(grid) for c in range(grid)]
        patches = torch.stack([block.permute(0, 2, 3, 1).flatten(1) for block in blocks], dim=1)
        shapes = torch.tensor([[grid, grid]] * len(pixels))
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2]),
            "spatial_shapes": shapes,
        }
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
        inputs["noise"] = torch.arange(pixels.shape[-1] ** 2 / 16).expand(len(pixels), -1)
        encoder.layernorm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    output = encoder(**inputs, output_attentions=True)
    return output.attentions, before_norm[0] if before_norm else output.last_hidden_state


def assert_teaches_as(teacher, images, encoder, layers):
    output = teacher(images)
    attentions, tokens = run_eager(encoder, teacher.preprocess(images))
    for layer, (q, k) in zip(layers, output.queries_keys, strict=True):
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(maps, attentions[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.patch_tokens, tokens[:, output.prefix :], rtol=1e-4, atol=1e-4)


def test_queries_and_keys_make_the_encoders_own_maps_and_the_tokens_are_its_last(saved):
    teacher = VisionTeacher.from_pretrained(str(saved.folder), layers=[2, 0])
    images = random_images()
    output = teacher(images)
    assert output.prefix == teacher.prefix == saved.prefix
    assert {tensor.shape for pair in output.queries_keys for tensor in pair} == {(2, 3, saved.prefix + 16, 8)}
    assert output.patch_tokens.shape == (2, 16, 24) and teacher.width == 24 and teacher.num_heads == 3
    model = AutoModel.from_pretrained(saved.folder, attn_implementation="eager")
    assert_teaches_as(teacher, images, vision_tower(model), [2, 0])


def resize_by_pillow(table, own, grid):
    """Bicubic with antialiasing, channel by channel, by another library."""
    prefix, patches = table[: -(own**2)], table[-(own**2) :].T.reshape(-1, own, own).numpy()
    maps = [Image.fromarray(channel).resize((grid, grid), Image.Resampling.BICUBIC) for channel in patches]
    resized = torch.stack([torch.from_numpy(np.array(channel)).flatten() for channel in maps], dim=1)
    return torch.cat([prefix, resized])


@pytest.mark.parametrize("grid", [3, 6])
def test_on_another_grid_it_is_the_encoder_with_its_positions_resampled_once(saved, grid):
    """The reference: transformers' model of the other size, whose table of positions Pillow has resampled.

    DINOv3, SigLIP 2 NaFlex and C-RADIO take any grid by themselves, so theirs is the same folder.
    """
    teacher = VisionTeacher.from_pretrained(str(saved.folder), layers=[1], grid=grid)
    assert teacher.image_size == 4 * grid
    model = AutoModel.from_pretrained(saved.folder, attn_implementation="eager")
    if saved.name not in ("dinov3", "siglip2_naflex", "radio"):
        state = vision_tower(model).state_dict()
        for name in ("embeddings.position_embeddings", "embeddings.position_embedding.weight"):
            if name in state:
                state[name] = resize_by_pillow(state[name].view(-1, 24), 4, grid).view(*state[name].shape[:-2], -1, 24)
        config = AutoConfig.from_pretrained(saved.folder)
        getattr(config, "vision_config", config).image_size = 4 * grid
        model = type(model)._from_config(config, attn_implementation="eager").eval()
        vision_tower(model).load_state_dict(state, strict=False)
    assert_teaches_as(teacher, random_images(20), vision_tower(model), [1])


@pytest.mark.parametrize(
    ("folder", "resolution", "pixels"),
    [("dinov2", 256, 224), ("dinov2", 512, 448), ("mae", 256, 256), ("mae", 512, 512)],
)
def test_images_get_the_sizes_of_repa(tmp_path, folder, resolution, pixels):
    """224·(R/256) where patches are 14 pixels wide, R where they are 16."""
    patch = {"dinov2": 14, "mae": 16}[folder]
    config = {"model_type": "dinov2", "patch_size": patch, "image_size": 37 * patch}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = AutoConfig.from_pretrained(tmp_path)
    assert encoder._choose_image_size("teacher", config, resolution // 16, None, "match") == pixels


# ---- what runs and what is kept ----


@pytest.fixture
def attention_calls(monkeypatch):
    """Weak references to the q and k of every attention call, in order."""
    calls, original = [], encoder.sdpa_attention_forward

    def attend(module, query, key, *args, **kwargs):
        calls.append((weakref.ref(query), weakref.ref(key)))
        return original(module, query, key, *args, **kwargs)

    monkeypatch.setattr(encoder, "sdpa_attention_forward", attend)
    return calls


def alive(calls):
    return [query() is not None and key() is not None for query, key in calls]


def test_only_the_needed_layers_keep_their_queries_and_keys(saved, attention_calls):
    teacher = VisionTeacher.from_pretrained(str(saved.folder), layers=[0, 2])
    output = teacher(random_images())
    assert alive(attention_calls) == [True, False, True]
    del output
    assert alive(attention_calls) == [False, False, False]


def test_features_alone_keep_no_queries_and_keys(saved, attention_calls):
    output = VisionTeacher.from_pretrained(str(saved.folder))(random_images())
    assert output.queries_keys == [] and output.patch_tokens is not None
    assert alive(attention_calls) == [False, False, False]


def test_layers_after_the_last_needed_one_do_not_run_without_features(saved, attention_calls):
    images = random_images()
    full = VisionTeacher.from_pretrained(str(saved.folder), layers=[0, 1])
    expected = full(images)
    assert len(attention_calls) == 3
    short = VisionTeacher.from_pretrained(str(saved.folder), layers=[0, 1], features=False)
    output = short(images)
    assert len(attention_calls) == 3 + 2
    assert sum(p.numel() for p in short.parameters()) < 0.8 * sum(p.numel() for p in full.parameters())
    assert output.patch_tokens is None
    for pair, expected_pair in zip(output.queries_keys, expected.queries_keys, strict=True):
        torch.testing.assert_close(pair, expected_pair)


def test_poolers_and_the_text_side_are_gone(saved):
    teacher = VisionTeacher.from_pretrained(str(saved.folder))
    kinds = {type(module).__name__ for module in teacher.modules()}
    assert not [kind for kind in kinds if "Pool" in kind or "Text" in kind]
    assert "MultiheadAttention" not in kinds  # SigLIP's pooler


def test_a_teacher_is_frozen_and_stays_in_eval_mode(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(random_images().requires_grad_())
    assert not output.patch_tokens.requires_grad and not output.queries_keys[0][0].requires_grad


def test_dropping_a_teacher_frees_it(dinov2_folder):
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0])
    teacher(random_images())
    parameters = [weakref.ref(parameter) for parameter in teacher.parameters()]
    del teacher
    gc.collect()
    assert [reference for reference in parameters if reference() is not None] == []


def test_two_teachers_record_apart(dinov2_folder):
    first = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[0])
    second = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[1, 2])
    images = random_images()
    expected = first(images).queries_keys[0][0]
    second(images)
    torch.testing.assert_close(first(images).queries_keys[0][0], expected)


def test_weights_saved_in_half_precision_run_in_float32(dinov2_folder, tmp_path):
    Dinov2Model.from_pretrained(dinov2_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    teacher = VisionTeacher.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


# ---- another grid than the student's ----


@pytest.mark.parametrize(("grid", "image_size"), [(2, None), (6, None), (6, 20)])
def test_interpolated_tokens_are_those_of_the_teachers_own_grid_made_larger_or_smaller(saved, grid, image_size):
    folder, images = str(saved.folder), random_images(20)
    own = VisionTeacher.from_pretrained(folder, layers=[1], image_size=image_size)(images)
    teacher = VisionTeacher.from_pretrained(folder, [1], grid, image_size, grid_rule="interpolate")
    assert teacher.image_size == (image_size or 16) and teacher.student_grid == grid
    output = teacher(images)
    assert output.prefix == 0
    own_grid = teacher.image_size // 4
    (q, k), (own_q, own_k) = output.queries_keys[0], own.queries_keys[0]
    pairs = [(q, own_q[:, :, own.prefix :]), (k, own_k[:, :, own.prefix :]), (output.patch_tokens, own.patch_tokens)]
    for tokens, own_tokens in pairs:
        torch.testing.assert_close(tokens, resample_tokens(own_tokens, own_grid, grid))
    assert f"{own_grid} x {own_grid} tokens interpolated to {grid} x {grid}" in teacher.describe()


def test_interpolation_leaves_a_grid_that_fits_alone(dinov2_folder):
    images = random_images()
    teacher = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[1], grid=4, grid_rule="interpolate")
    expected = VisionTeacher.from_pretrained(str(dinov2_folder), layers=[1])(images)
    output = teacher(images)
    assert output.prefix == expected.prefix == 1
    torch.testing.assert_close(output.queries_keys, expected.queries_keys)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": [3]}, "--layer-map must name layers from 0 to 2 of the teacher .* got 3"),
        ({"layers": [-1]}, "--layer-map must name layers .* got -1"),
        (
            {"grid": 6, "image_size": 16},
            "--teacher-resolution must be 24, .* 6 x 6 tokens, got 16, .* 4 x 4; or give --teacher-grid interp",
        ),
        ({"image_size": 18}, "--teacher-resolution must be a multiple of 4, .* got 18"),
        ({"image_size": 0}, "--teacher-resolution must be a multiple of 4, .* got 0"),
        (
            {"grid": 6, "image_size": 18, "grid_rule": "interpolate"},
            "--teacher-resolution must be a multiple of 4, .* got 18",
        ),
    ],
)
def test_what_does_not_fit_is_refused(dinov2_folder, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(dinov2_folder), **arguments)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "bert"}, "must be a model of one of the families .*dinov2.*, got 'bert'"),
        ({"model_type": "dinov2", "patch_size": [4, 2]}, r"patch_size of the teacher .* must be square, got \(4, 2\)"),
        ({"model_type": "no-such-model"}, "must be a model of one of the families .* got 'no-such-model'"),
    ],
)
def test_a_folder_that_holds_no_teacher_is_refused(tmp_path, config, sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(dinov2_folder, tmp_path):
    shutil.copy(dinov2_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionTeacher.from_pretrained(str(tmp_path))


def test_a_folder_that_lacks_weights_of_the_last_layer_is_refused(saved, tmp_path):
    model = AutoModel.from_pretrained(saved.folder)
    blocks = encoder.find_layers(vision_tower(model), 3)
    last = next(name for name, module in model.named_modules() if module is blocks[2])
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(last)}
    model.save_pretrained(tmp_path, state_dict=state)
    sentence = r"lacks \d+ weights of its encoder, such as " + re.escape(last.removeprefix("vision_model."))
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(tmp_path))


def test_a_folder_whose_weights_have_another_patch_is_refused_with_both_shapes_alone(saved, tmp_path, caplog):
    shutil.copytree(saved.folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "config.json").read_text()
    assert '"patch_size": 4' in text
    (tmp_path / "config.json").write_text(text.replace('"patch_size": 4', '"patch_size": 2'))
    logging.getLogger("transformers").addHandler(caplog.handler)  # which keeps its lines from the root's handlers
    with pytest.raises(UserError, match=r"must be [\dx ]+ by its config.json, got [\dx ]+$"):
        VisionTeacher.from_pretrained(str(tmp_path))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""


def test_wrong_number_of_channels_is_refused(dinov2_folder):
    with pytest.raises(UserError, match="images must have 1 channel or the teacher's 3, got 4"):
        VisionTeacher.from_pretrained(str(dinov2_folder))(torch.rand(1, 4, 16, 16))
