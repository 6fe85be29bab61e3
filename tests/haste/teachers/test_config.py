"""Folders of teachers that are none, or that act or ask for too much."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from haste import weights
from haste.errors import UserError
from haste.teachers.encoder import VisionTeacher
from haste.teachers.families import FAMILIES
from haste.teachers.loading import load_config, load_normalisation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def folder(dinov2_folder, tmp_path) -> Path:
    return Path(shutil.copytree(dinov2_folder, tmp_path / "teacher"))


def change(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": 0}, "has hidden_size 0; it must be 1 to 65,536"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": 25}, "cannot be loaded"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000; it must be 1 to 1,000"),
        ({"num_attention_heads": -3}, "has num_attention_heads -3"),
        ({"num_channels": None}, "num_channels"),
        ({"patch_size": 0}, "has patch_size 0; it must be 1 to 4,096 pixels"),
        ({"patch_size": []}, "patch_size"),
        ({"image_size": 10**6}, "has image_size 1000000; it must be"),
        ({"hidden_size": 24_000}, r"its config.json asks for [\d,]+ numbers, and its weights .* have \d"),
        ({"layer_norm_eps": "small"}, "cannot be loaded"),
        ({"hidden_act": "no-such-function"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"model_type": ["dinov2"]}, "is a .* model; a teacher must be one of"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder, values, sentence):
    change(folder, **values)
    with pytest.raises(UserError, match=sentence):
        VisionTeacher.from_pretrained(str(folder))


def test_files_that_are_none(folder):
    for content, sentence in (("[]", "a JSON object, and is list"), ("{", "is no JSON"), ("{}", "is a 'None' model")):
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
        with pytest.raises(UserError, match="is a 'own' model; a teacher must be one of"):
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
    monkeypatch.setattr(weights, "is_reachable", lambda: False)
    with pytest.raises(UserError, match="--enc-type must be .* got somebody/none; the hub cannot be"):
        VisionTeacher.from_pretrained("somebody/none")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"image_mean": []}, "image_mean in preprocessor_config.json of the teacher .* must be finite"),
        ({"image_mean": "grey"}, "image_mean of preprocessor_config.json .* must be a number or "),
        ({"image_std": [0.5, 0, 0.5]}, "must be finite and above 0"),
        ({"image_std": float("nan")}, "image_std of preprocessor_config.json .* is nan"),
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
