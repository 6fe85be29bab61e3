"""The CLIP score: against transformers' own forward pass, and where captions come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from haste.data.images import ImageArray, open_images, write_image, write_npz
from haste.errors import UserError
from haste.evaluation.clip import ClipExtractor, center_square
from haste.evaluation.evaluate import clip_score, evaluate, recorded_captions
from haste.metrics.features import resize_smoothly
from haste.teachers.families import CLIP
from text_files import CAPTIONS, TOKENS, save_text_encoder
from torch.nn import functional as F

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder) -> ClipExtractor:
    return ClipExtractor(str(folder))


@pytest.mark.parametrize("side", [8, 20])
def test_a_score_is_a_hundred_times_the_cosine_of_the_model_or_0(folder, clip, side):
    images = np.random.default_rng(1).integers(0, 256, (6, side, side, 3), dtype=np.uint8)
    model, tokenizer = tf.CLIPModel.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in CLIP)
    pixels = (resize_smoothly(torch.from_numpy(images).permute(0, 3, 1, 2), 8) / 255 - mean) / std
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
    cosines = F.cosine_similarity(out.image_embeds, out.text_embeds).numpy()
    assert (cosines < 0).any() and (cosines > 0).any()
    scores = clip.scores(ImageArray(images), CAPTIONS, batch_size=4)
    assert scores == pytest.approx(np.maximum(100 * cosines, 0), abs=1e-3)
    assert clip_score(clip, ImageArray(images), CAPTIONS, 4).value == pytest.approx(scores.mean(), abs=1e-4)


def test_of_an_image_that_is_not_square_the_centre_is_seen():
    images = torch.zeros(1, 3, 8, 24, dtype=torch.uint8)
    images[..., 8:16] = 200
    assert (center_square(images, 8) == 200).all() and center_square(images.mT, 4).shape == (1, 3, 4, 4)


def test_captions_that_are_too_long_are_counted(folder):
    clip = ClipExtractor(str(folder))
    result = clip_score(clip, ImageArray(IMAGES[:2]), ["a red temple", "red " * 30], 4)
    assert result.note.startswith("1 of the captions") and f"{TOKENS} tokens" in result.note
    assert clip_score(clip, ImageArray(IMAGES[:1]), ["a red temple"], 4).note is None


def test_captions_are_read_from_the_folder_by_number_and_from_the_npz(tmp_path):
    samples = tmp_path / "s"
    for number in (0, 2, 3):
        write_image(samples / f"{number:06d}.png", IMAGES[number])
    (samples / "captions.json").write_text(json.dumps({"captions": CAPTIONS[:4]}))
    assert recorded_captions(samples, open_images(samples, "--samples")) == [CAPTIONS[n] for n in (0, 2, 3)]
    write_npz(tmp_path / "s.npz", IMAGES, None, CAPTIONS)
    read = open_images(tmp_path / "s.npz", "--samples", 4)
    assert recorded_captions(tmp_path / "s.npz", read) == CAPTIONS[:4] and read.labels is None
    write_npz(tmp_path / "both.npz", IMAGES, np.arange(6), [None] * 6)
    both = open_images(tmp_path / "both.npz", "--samples")
    assert both.captions is None and both.labels.tolist() == list(range(6))


@pytest.mark.parametrize("content", ["", "[]", '{"captions": 3}', '{"captions": [3]}', "{}"])
def test_damaged_captions_are_named(tmp_path, content):
    write_image(tmp_path / "000000.png", IMAGES[0])
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match="captions.json"):
        recorded_captions(tmp_path, open_images(tmp_path, "--samples"))


def test_images_without_captions_are_refused(tmp_path):
    write_image(tmp_path / "s" / "000000.png", IMAGES[0])
    with pytest.raises(UserError, match="^--samples must hold captions.json"):
        recorded_captions(tmp_path / "s", open_images(tmp_path / "s", "--samples"))
    write_npz(tmp_path / "s.npz", IMAGES, np.zeros(6))
    with pytest.raises(UserError, match="^--samples must hold captions "):
        recorded_captions(tmp_path / "s.npz", open_images(tmp_path / "s.npz", "--samples"))
    for captions in ([None], [], ["a", "b"][:0]):
        (tmp_path / "s" / "captions.json").write_text(json.dumps({"captions": captions}))
        with pytest.raises(UserError, match="must have a caption for each image, got none for image 0"):
            recorded_captions(tmp_path / "s", open_images(tmp_path / "s", "--samples"))


def test_captions_of_an_npz_are_text_one_for_each_image(tmp_path):
    np.savez(tmp_path / "few.npz", arr_0=IMAGES, captions=np.array(["a"]))
    np.savez(tmp_path / "numbers.npz", arr_0=IMAGES, captions=np.arange(6))
    for name in ("few", "numbers"):
        with pytest.raises(UserError, match=f"captions in .*{name}.npz must be"):
            open_images(tmp_path / f"{name}.npz", "--samples")


def test_models_that_are_no_clip_are_refused(tmp_path):
    text = save_text_encoder(tmp_path / "text", kind="clip_text_model")
    dino = tmp_path / "dino"
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    tf.Dinov2Model(tf.Dinov2Config(**sizes)).save_pretrained(dino)
    for name in (text, dino, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="^--clip must be"):
            ClipExtractor(str(name))


def test_evaluate_has_the_score_as_its_last_result(tmp_path, folder, clip):
    features = tmp_path / "teacher"
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    tf.Dinov2Model(tf.Dinov2Config(**sizes)).save_pretrained(features)
    write_npz(tmp_path / "real.npz", IMAGES, np.zeros(6))
    found = evaluate(IMAGES, str(features), str(tmp_path / "real.npz"), clip=str(folder), captions=CAPTIONS)
    assert found.results[-1].key == "clip_score" and found.settings["clip"] == clip.key
    assert found["clip_score"].value == pytest.approx(clip.scores(ImageArray(IMAGES), CAPTIONS).mean(), abs=1e-4)
    assert "CLIP score" in str(found)
    with pytest.raises(UserError, match="^captions must be given"):
        evaluate(IMAGES, str(features), str(tmp_path / "real.npz"), clip=str(folder))
