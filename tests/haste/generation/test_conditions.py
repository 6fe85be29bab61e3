"""From a checkpoint of a text-to-image model to images of prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import haste
import numpy as np
import pytest
import torch
from digits_run import write_run
from haste.data.images import to_uint8
from haste.errors import UserError
from haste.generation import conditions
from haste.generation.conditions import PromptConditions, text_format
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler
from haste.samplers import initial_noise, sample
from haste.samplers.labels import image_generator
from haste.text import TextEncoder, TextFormat
from text_files import CAPTIONS, TOKENS, WIDTH, save_text_encoder
from text_run import SHAPE, write_public, write_text_run

PROMPTS = "a red temple\na dark flower\na bright square of no photograph\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_text_run(tmp_path_factory.mktemp("exps"))


@pytest.fixture(scope="module")
def encoder(run) -> TextEncoder:
    return TextEncoder(TextFormat.of(str(run.parent / "clip")))


def noise(indices, seed: int = 0) -> torch.Tensor:
    generators = [image_generator(seed, index, "noise") for index in indices]
    return initial_noise((len(generators), 1, SHAPE["input_size"], SHAPE["input_size"]), generators)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"num_steps": 4, "cfg_scale": 3.0, "guidance_high": 0.7}, {}),
        ({"num_steps": 3, "heun": True, "cfg_scale": 2.0}, {"sampler": "heun"}),
        ({"num_steps": 3, "mode": "sde"}, {"sampler": "euler-maruyama"}),
    ],
)
def test_images_are_those_of_the_sampler_with_the_features_of_their_prompts(run, encoder, settings, same):
    """Image i has prompt i mod 3 and noise of its own; guidance is against the recorded empty caption."""
    loaded = load_checkpoint(run)
    numbers = [1, 5, 3]
    images, labels = Sampler(loaded, SamplingConfig(prompts=PROMPTS, **settings)).sample(numbers)
    texts = PROMPTS.split("\n")
    condition = encoder.encode([texts[number % 3] for number in numbers])
    arguments = {name: value for name, value in settings.items() if name not in ("heun", "mode")}
    generators = [image_generator(0, number, "noise") for number in numbers]
    start = initial_noise((3, 1, 8, 8), generators)
    null = torch.load(loaded.checkpoint, weights_only=False)["null"]
    drawn = sample(loaded.model, start, condition, null=null, generator=generators, **arguments, **same)
    difference = images.astype(int) - to_uint8(drawn).astype(int)
    assert np.abs(difference).max() <= 1 and images.std() > 10  # encoded in another batch: a cut may fall between
    assert labels.tolist() == [-1] * 3


def test_another_prompt_is_another_image_of_the_same_noise(run):
    same, other = (haste.sample(run, prompts=[text], num_steps=4) for text in ("a red temple", "a dark flower"))
    assert same.shape == (1, 8, 8, 3) and (same != other).mean() > 0.2
    assert (same == haste.sample(run, prompts="a red temple", num_images=1, num_steps=4)).all()


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0, "guidance_low": 0.3}, {"mode": "sde"}])
def test_an_image_is_the_same_in_any_batch_and_order(run, settings):
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=4, global_seed=3, prompts=PROMPTS, **settings))
    whole, _ = sampler.sample(range(5))
    parts = np.concatenate([sampler.sample(numbers)[0] for numbers in ([4, 2], [0], [3, 1])])
    assert np.abs(parts.astype(int) - whole[[4, 2, 0, 3, 1]].astype(int)).max() <= 1


def test_features_do_not_depend_on_which_prompts_are_asked_for(run, monkeypatch):
    """Bit for bit, as they are encoded in batches that are fixed by their numbers."""
    monkeypatch.setattr(conditions, "TEXTS_AT_ONCE", 2)
    loaded, settings = load_checkpoint(run), SamplingConfig(prompts=PROMPTS)
    first, second = PromptConditions(loaded, settings), PromptConditions(loaded, settings)
    whole = first.of(range(6))
    assert whole.shape == (6, TOKENS, WIDTH) and torch.equal(whole[:3], whole[3:])
    for number in (2, 1, 0):
        assert torch.equal(second.of([number])[0], whole[number])


def test_the_encoder_is_loaded_once_when_it_is_needed_and_freed(run, monkeypatch):
    made = []

    class Counted(TextEncoder):
        def __init__(self, text):
            made.append(self)
            super().__init__(text)

    monkeypatch.setattr(conditions, "TextEncoder", Counted)
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=1, prompts=PROMPTS))
    assert not made
    for numbers in ([0, 1], [2, 3], [4]):
        sampler.sample(numbers)
    assert len(made) == 1 and sampler.conditions._encoder is None
    sampler.with_settings(SamplingConfig(num_steps=2, prompts=PROMPTS, cache="taylor", interval=1, order=0)).sample([0])
    assert len(made) == 1  # the features are those of the same prompts


def test_of_many_prompts_only_some_features_are_kept(run, monkeypatch):
    monkeypatch.setattr(conditions, "TEXTS_AT_ONCE", 1)
    monkeypatch.setattr(conditions, "BATCHES_KEPT", 2)
    few = PromptConditions(load_checkpoint(run), SamplingConfig(prompts=PROMPTS))
    once = few.of(range(3))
    assert len(few._kept) == 2 and few._encoder is not None
    assert torch.equal(few.of([0, 1, 2]), once)


def test_without_prompts_the_captions_of_the_data_are_sampled(run, tmp_path):
    sampler = Sampler(load_checkpoint(run), SamplingConfig())
    assert sampler.conditions.captions(range(8)) == [*CAPTIONS, *CAPTIONS[:2]]
    public = write_public(tmp_path / "0150000.pt")
    with pytest.raises(UserError, match="^--prompts must be given for .*0150000.pt"):
        Sampler(load_checkpoint(public), SamplingConfig(text_encoder=str(run.parent / "clip")))


def test_a_checkpoint_without_a_null_condition_is_guided_by_the_empty_caption(tmp_path, run, encoder):
    """As those of REPA and HASTE, which record neither it nor the encoder."""
    from haste.models import registry

    loaded = load_checkpoint(write_text_run(tmp_path, null=False))
    sampler = Sampler(loaded, SamplingConfig(prompts=PROMPTS, cfg_scale=2.0))
    assert torch.allclose(sampler.null, encoder.encode([""])[0], atol=1e-6)
    assert Sampler(loaded, SamplingConfig(prompts=PROMPTS)).null is None  # nothing is encoded for it
    assert registry.get_family(loaded.model_config).null(loaded.model) is None


def test_a_run_without_dropped_captions_has_no_guidance(tmp_path, run):
    args = load_checkpoint(run).config.to_namespace()
    args.cfg_prob = 0.0
    loaded = load_checkpoint(write_text_run(tmp_path, args=args))
    with pytest.raises(UserError, match="^--cfg-scale must be 1 for a model trained with --cfg-prob 0, got 2"):
        Sampler(loaded, SamplingConfig(prompts=PROMPTS, cfg_scale=2.0))
    assert Sampler(loaded, SamplingConfig(prompts=PROMPTS, num_steps=1)).sample([0])[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "taylor", "granularity": "module", "interval": 3, "order": 1},
        {"cache": "newton", "granularity": "block", "interval": 2, "order": 1, "cfg_scale": 2.0},
        {"cache": "taylor", "granularity": "model", "interval": 2, "order": 1},
        {"cache": "hermite", "granularity": "output", "interval": 2, "order": 1},
        {"cache": "delta-dit", "interval": 2},
    ],
)
def test_caches_forecast_some_calls_and_draw_nearly_the_same(run, settings):
    loaded, shared = load_checkpoint(run), {"num_steps": 12, "prompts": PROMPTS}
    cached = Sampler(loaded, SamplingConfig(**shared, **settings))
    scale = {"cfg_scale": settings.get("cfg_scale", 1.0)}
    images, full = cached.sample(range(3))[0], Sampler(loaded, SamplingConfig(**shared, **scale)).sample(range(3))[0]
    calls, fully = cached.calls
    assert calls == 12 and fully < 12
    difference = np.abs(images.astype(int) - full.astype(int))
    assert 0 < difference.mean() < 0.5 * full.std()


def test_fast_chooses_a_cache_for_it(run):
    fast = haste.sample(run, prompts=["a red temple"], num_steps=12, fast=True)
    assert (fast != haste.sample(run, prompts=["a red temple"], num_steps=12)).any()


# ---- refusals ----


def test_labels_of_a_model_of_text_and_prompts_of_a_model_of_classes(run, tmp_path):
    for labels in ("3,1", "none"):
        with pytest.raises(UserError, match="^--labels must be left out for this MM-DiT"):
            Sampler(load_checkpoint(run), SamplingConfig(labels=labels))
    classes = load_checkpoint(write_run(tmp_path))
    for settings, flag in (({"prompts": "a cat\n"}, "prompts"), ({"text_encoder": "x"}, "text-encoder")):
        with pytest.raises(UserError, match=f"^--{flag} must be left out for this SiT"):
            Sampler(classes, SamplingConfig(**settings))


def test_an_encoder_of_another_width_or_of_fewer_tokens(run, tmp_path):
    loaded = load_checkpoint(run)
    wide = save_text_encoder(tmp_path / "wide", width=WIDTH + 4)
    short = save_text_encoder(tmp_path / "short", longest=TOKENS - 2)
    for folder, found in ((wide, f"{TOKENS} tokens of {WIDTH + 4}"), (short, f"{TOKENS - 2} tokens of {WIDTH}")):
        with pytest.raises(UserError, match=f"^--text-encoder must be .*{TOKENS} tokens of {WIDTH} .* got .*{found}"):
            Sampler(loaded, SamplingConfig(prompts=PROMPTS, text_encoder=str(folder)))
    long = save_text_encoder(tmp_path / "long", longest=TOKENS + 5)
    assert text_format(loaded, str(long)) == TextFormat(str(long), TOKENS, WIDTH)
    assert Sampler(loaded, SamplingConfig(prompts=PROMPTS, text_encoder=str(long), num_steps=1)).sample([0])[0].any()


def test_a_model_without_a_recorded_encoder_needs_one_of_its_width(tmp_path, run):
    loaded = load_checkpoint(write_text_run(tmp_path, text=None))
    with pytest.raises(UserError, match="^--text-encoder must be given.* got openai/clip-vit-large-patch14 of 77 "):
        Sampler(loaded, SamplingConfig(prompts=PROMPTS))
    given = Sampler(loaded, SamplingConfig(prompts=PROMPTS, text_encoder=str(run.parent / "clip"), num_steps=1))
    assert given.sample([0])[0].shape == (1, 8, 8, 3)


def test_an_encoder_that_training_made_is_found_where_it_moved_with_the_run(tmp_path):
    run = write_text_run(tmp_path / "exps")
    loaded = load_checkpoint(run)
    recorded = loaded.text.encoder
    assert text_format(loaded, None).encoder == recorded
    (tmp_path / "exps" / "encoders").mkdir()
    (tmp_path / "exps" / "clip").rename(tmp_path / "exps" / "encoders" / "clip")
    assert text_format(loaded, None).encoder == str(tmp_path / "exps" / "encoders" / "clip")
    (tmp_path / "exps" / "encoders").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="^--text-encoder must be .*clip"):
        haste.sample(run, prompts=["a red temple"], num_steps=1)


@pytest.mark.parametrize("prompts", [[], [""], ["a cat", " "], [3], 3])
def test_lists_that_are_no_prompts(run, prompts):
    with pytest.raises(UserError, match="^prompts"):
        haste.sample(run, prompts=prompts)


def test_prompts_that_are_too_long_are_truncated_counted_and_said(run, caplog):
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=1, prompts="a red cat\n" + 20 * "red " + "\n"))
    with caplog.at_level(logging.WARNING):
        sampler.sample([0, 1])
    assert sampler.conditions.truncated == 1 and f"more than {TOKENS} tokens are truncated" in caplog.text
