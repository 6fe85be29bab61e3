"""Text encoders of transformers from a folder, and the format of their features."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers as tf
from haste.errors import UserError
from haste.text import CLIP_L, TextEncoder, TextFormat
from text_files import CAPTIONS, TOKENS, WIDTH, save_text_encoder, save_tokenizer

CLASSES = {"clip": tf.CLIPTextModel, "clip_text_model": tf.CLIPTextModel, "t5": tf.T5EncoderModel}


@pytest.fixture(scope="module", params=CLASSES)
def encoder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, save_text_encoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def clip(tmp_path) -> Path:
    return save_text_encoder(tmp_path / "clip")


def test_features_are_the_last_hidden_state_after_the_norm_padded_and_unmasked(encoder):
    kind, folder = encoder
    text = TextFormat.of(str(folder))
    assert text == TextFormat(str(folder), TOKENS, WIDTH)
    prompts = ["a red temple", "", *CAPTIONS]
    features = TextEncoder(text).encode(prompts)
    assert features.shape == (len(prompts), TOKENS, WIDTH) and features.dtype == torch.float32
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = CLASSES[kind].from_pretrained(folder).eval()
    for prompt, found in zip(prompts, features, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids + [tokenizer.pad_token_id] * (TOKENS - len(ids))
        expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(found, expected)
    if kind != "t5":
        means = torch.nn.functional.layer_norm(features, (WIDTH,)).mean(-1)
        torch.testing.assert_close(features.mean(-1), means, rtol=0, atol=1e-4)  # it has been normalised
    assert not features.requires_grad


def test_prompts_that_are_too_long_are_truncated_counted_and_said_once(clip, caplog):
    encoder = TextEncoder(TextFormat.of(str(clip)))
    long = " ".join(["a red temple"] * 5)
    short = " ".join(["a red temple"] * 5).split()[: TOKENS - 2]
    features = encoder.encode([long, " ".join(short), long])
    torch.testing.assert_close(features[0], features[1])
    assert encoder.truncated == 2
    encoder.encode([long, "a temple"])
    assert encoder.truncated == 3
    assert [record.message for record in caplog.records] == [
        f"prompts of more than {TOKENS} tokens are truncated, as the text encoder takes no more: "
        f"str '{long[:39]}... (17 tokens)"
    ]


def test_many_prompts_are_the_same_as_one_by_one_and_none_are_none(clip, monkeypatch):
    encoder = TextEncoder(TextFormat.of(str(clip)))
    monkeypatch.setattr("haste.text.PROMPTS_AT_A_TIME", 4)
    together = encoder.encode(CAPTIONS)
    torch.testing.assert_close(together, torch.cat([encoder.encode([caption]) for caption in CAPTIONS]))
    assert encoder.encode([]).shape == (0, TOKENS, WIDTH)
    assert encoder.train().training is False and not any(p.requires_grad for p in encoder.parameters())


def test_the_text_encoder_of_a_pipeline(tmp_path):
    save_text_encoder(tmp_path / "text_encoder", "clip_text_model")
    save_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "text_encoder").glob("token*"):
        path.unlink()
    text = TextFormat.of(str(tmp_path))
    assert text == TextFormat(str(tmp_path), TOKENS, WIDTH)
    assert TextEncoder(text).encode(["a red temple"]).shape == (1, TOKENS, WIDTH)


def test_the_format_is_plain_values_and_clip_l_needs_no_hub(clip):
    text = TextFormat.of(str(clip))
    assert TextFormat.from_dict(json.loads(json.dumps(asdict(text)))) == text and text.shape == (TOKENS, WIDTH)
    assert TextFormat.of("openai/clip-vit-large-patch14") == CLIP_L == TextFormat(CLIP_L.encoder, 77, 768)
    for values, name in [
        ({"encoder": "x", "tokens": 0, "width": 3}, "tokens"),
        ({"encoder": "x", "tokens": 3}, "width"),
    ]:
        with pytest.raises(UserError, match=name):
            TextFormat.from_dict(values)


def test_an_encoder_without_a_longest_input_takes_512_tokens(tmp_path):
    save_text_encoder(tmp_path, "t5", longest=10**30)
    assert TextFormat.of(str(tmp_path)).tokens == 512


def test_what_is_no_text_encoder_is_refused(tmp_path, clip, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    tf.Dinov2Model(tf.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "dino"
    )
    save_text_encoder(tmp_path / "mute")
    for path in (tmp_path / "mute").glob("token*"):
        path.unlink()
    save_tokenizer(tmp_path / "mute2")
    for name, sentence in [
        ("nowhere", "--text-encoder must be a folder of save_pretrained"),
        (str(tmp_path / "empty"), "--text-encoder must be .* no config.json"),
        (str(tmp_path / "mute2"), "--text-encoder must be .* no config.json"),
        (str(tmp_path / "dino"), "--text-encoder must be a text encoder of one of clip, .*'dinov2'"),
        (str(tmp_path / "mute"), "--text-encoder must come with a tokenizer"),
    ]:
        with pytest.raises(UserError, match=sentence):
            TextFormat.of(name)
    with pytest.raises(UserError, match="--clip must be a folder"):
        TextFormat.of("nowhere", "--clip")


def test_another_width_than_the_datas_is_refused(clip):
    for tokens, width in [(TOKENS, WIDTH + 1), (TOKENS + 1, WIDTH)]:
        with pytest.raises(UserError, match=f"--text-encoder must have features of {tokens} x {width}, .* got 10 x 12"):
            TextEncoder(TextFormat(str(clip), tokens, width))
    with pytest.raises(UserError, match="--text-encoder must name the encoder of these 10 x 12 features"):
        TextEncoder(TextFormat("", TOKENS, WIDTH))
    assert TextEncoder(TextFormat(str(clip), 6, WIDTH)).encode(["a red temple"]).shape == (1, 6, WIDTH)


def test_weights_that_do_not_fit_the_config_are_refused(clip):
    path = clip / "config.json"
    config = json.loads(path.read_text())
    (clip / "model.safetensors").rename(clip / "kept")
    with pytest.raises(UserError, match="cannot be loaded"):
        TextEncoder(TextFormat(str(clip), TOKENS, WIDTH))
    shutil.copy(clip / "kept", clip / "model.safetensors")
    for key, value, sentence in [
        ("num_hidden_layers", 10**9, "num_hidden_layers of the text encoder .* must be from 1 to 1000"),
        ("intermediate_size", 10**9, "asks for .* numbers, but its weights"),
        ("num_hidden_layers", 3, "its weights lack .*layers.2"),
        ("vocab_size", 5, "--text-encoder must have a tokenizer of at most 5 tokens"),
    ]:
        path.write_text(json.dumps({**config, "text_config": {**config["text_config"], key: value}}))
        with pytest.raises(UserError, match=sentence):
            TextEncoder(TextFormat(str(clip), TOKENS, WIDTH))


def test_a_pickle_among_the_weights_is_not_executed(clip):
    class Exploit:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    (clip / "model.safetensors").unlink()
    torch.save(
        {"text_model.final_layer_norm.weight": Exploit(), "fill": torch.zeros(10_000)}, clip / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        TextEncoder(TextFormat(str(clip), TOKENS, WIDTH))


def test_a_tokenizer_without_padding_is_refused(clip):
    path = clip / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "pad_token"}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="--text-encoder must have a tokenizer with a pad_token"):
        TextEncoder(TextFormat.of(str(clip)))
