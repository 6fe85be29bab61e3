"""From a checkpoint to images: labels, numbers that are an image's own, and latents."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from digits_run import write_run
from haste.data.images import to_uint8
from haste.errors import UserError
from haste.generation.config import SamplingConfig, list_labels
from haste.generation.loaded import latent_format, load_checkpoint, run_checkpoints
from haste.generation.pipeline import Sampler, fit_to_family
from haste.samplers import initial_noise, sample
from haste.samplers.labels import choose_labels, image_generator, number_labels
from haste.vae import PUBLISHED_VAES, SD_LATENTS, VAE, LatentFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import save_vae
from latent_student import IMAGE, write_bare, write_ours, write_repas


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("exps"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heun": True},
        {"mode": "sde"},
        {"cfg_scale": 2.0, "guidance_high": 0.7},
        {"cache": "taylor", "interval": 3, "order": 1},
    ],
)
def test_an_image_is_the_same_in_any_batch(run, settings):
    student = load_checkpoint(run)
    sampler = Sampler(student, SamplingConfig(num_steps=8, global_seed=3, **settings))
    whole, labels = sampler.sample(range(7))
    parts = [sampler.sample(indices) for indices in ([0, 1], [5, 2], [6], [4, 3])]
    order = [0, 1, 5, 2, 6, 4, 3]
    assert (np.concatenate([part[1] for part in parts]) == labels[order]).all()
    difference = np.concatenate([part[0] for part in parts]).astype(int) - whole[order].astype(int)
    assert np.abs(difference).max() <= 1  # matrix products of another size round otherwise; a cut may fall between
    assert whole.shape == (7, 8, 8, 3) and whole.std() > 10  # images, not a constant


def test_another_seed_or_number_is_another_image(run):
    student = load_checkpoint(run)
    first = Sampler(student, SamplingConfig(num_steps=2, labels="3")).sample([0, 1])[0]
    other = Sampler(student, SamplingConfig(num_steps=2, labels="3", global_seed=1)).sample([0, 1])[0]
    images = [image.tobytes() for image in (*first, *other)]
    assert len(set(images)) == 4


def test_the_noise_does_not_depend_on_the_labels_that_are_asked_for():
    for purpose in ("label", "noise"):
        twice = [torch.randn(3, generator=image_generator(5, 9, purpose)) for _ in range(2)]
        assert torch.equal(*twice)
    label, noise = (torch.randn(3, generator=image_generator(5, 9, p)) for p in ("label", "noise"))
    assert not torch.equal(label, noise)


def test_labels_follow_the_policy():
    assert choose_labels("balanced", 0, range(12), 10).tolist() == [*range(10), 0, 1]
    assert choose_labels("3,1,4", 0, range(5), 10).tolist() == [3, 1, 4, 3, 1]
    drawn = choose_labels("random", 0, range(400), 10)
    assert (choose_labels("random", 0, [7, 300], 10) == drawn[[7, 300]]).all()
    counts = Counter(drawn.tolist())
    assert set(counts) == set(range(10)) and min(counts.values()) > 20
    assert (choose_labels("random", 1, range(400), 10) != drawn).any()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("all", "must be random, balanced, none, classes such as 3,1,4, or a file of them, got all"),
        ("3,10", "--labels must be classes from 0 to 9, got 10"),
        ("-1", "--labels must be classes from 0 to 9, got -1"),
    ],
)
def test_labels_that_do_not_exist_are_refused(policy, message):
    with pytest.raises(UserError, match=message):
        choose_labels(policy, 0, range(3), 10)


def test_images_of_no_class(run, tmp_path):
    """The null condition, whatever the guidance would make of it; not of a model that was trained without."""
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=4, labels="none"))
    images, labels = sampler.sample(range(3))
    assert labels.tolist() == [-1] * 3
    start = sampler.start_of(range(3))
    null = torch.full((3,), 10)
    wanted = sample(sampler.loaded.model, start.noise, null, num_steps=4)
    assert (images == to_uint8(wanted)).all()
    with pytest.raises(UserError, match="^--cfg-scale must be 1 with --labels none"):
        sampler.with_settings(SamplingConfig(labels="none", cfg_scale=2.0))
    without = load_checkpoint(write_run(tmp_path, cfg_prob=0.0))
    with pytest.raises(UserError, match="^--labels must be classes for a model trained with --cfg-prob 0"):
        Sampler(without, SamplingConfig(labels="none"))


def test_a_run_folder_means_its_newest_whole_checkpoint(tmp_path, caplog):
    run = write_run(tmp_path)
    assert load_checkpoint(run).step == 4
    newest = run / "checkpoints" / "0000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert load_checkpoint(run).step == 2
    assert "0000004.pt" in caplog.text
    assert [path.name for path in run_checkpoints(run)] == ["0000002.pt", "0000004.pt"]


def test_averaged_weights_unless_told_otherwise(run):
    averaged, trained = load_checkpoint(run).model, load_checkpoint(run, ema=False).model
    file = torch.load(run / "checkpoints" / "0000004.pt", weights_only=False)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(averaged.state_dict()[name], file["ema"][name])
    assert torch.equal(trained.state_dict()[name], file["model"][name])


def test_labels_may_be_names_that_the_checkpoint_knows():
    assert number_labels("dog, 1,cat", ["cat", "1", "dog"]) == "2,1,0"
    assert number_labels("random", ["random", "cat"]) == "random" and number_labels("3,1", []) == "3,1"
    assert number_labels("cow,cat", ["cat"]) == "cow,0"  # refused with the classes that there are


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ckpt must be .*, which holds no checkpoints"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="--ckpt must be .*0000400.pt, which does not exist"):
        load_checkpoint(tmp_path / "0000400.pt")


def test_the_folder_of_checkpoints_inside_a_run_names_the_run(run):
    with pytest.raises(UserError, match=f"--ckpt must be .*such as {run}, got"):
        load_checkpoint(run / "checkpoints")


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, (8, 8)),
        ({"heun": True}, (15, 15)),  # two per step but for the last
        ({"cache": "taylor", "interval": 3, "order": 1}, (8, 4)),  # steps 0, 1, 4 and 7 are full
    ],
)
def test_calls_are_counted(run, settings, calls):
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=8, **settings))
    sampler.sample([0])
    assert sampler.calls == calls


@torch._dynamo.config.patch(recompile_limit=2)
def test_compiled_blocks_serve_any_number_of_batch_sizes(run, monkeypatch):
    """As `haste sample --compile` without a cache compiles them, by Dynamo alone."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend="eager", **options))
    torch._dynamo.reset()
    sampler = Sampler(load_checkpoint(run), SamplingConfig(num_steps=2))
    eager = sampler.sample(range(10))[0].astype(int)
    sampler.speed_up(compile=True, cuda_graphs=False)
    for count in range(1, 11):
        assert np.abs(sampler.sample(range(count))[0].astype(int) - eager[:count]).max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heun": True, "mode": "sde"}, "--heun must come with --mode ode"),
        ({"mode": "ddim"}, "--mode must be ode or sde for this SiT, which predicts a velocity, got ddim"),
        (
            {"timestep_spacing": "leading"},
            "--timestep-spacing must be left out for this SiT, which predicts a velocity",
        ),
        ({"interval": 3}, "--interval must be left out"),
        ({"time_shift": 0.0}, "--time-shift must be a number from 0.001 to 1,000, got 0"),
        ({"global_seed": -1}, "--global-seed must be an integer from 0 to 9,223,372,036,854,775,807, got -1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(run, settings, message):
    with pytest.raises(UserError, match=message):
        Sampler(load_checkpoint(run), SamplingConfig(**settings))


def test_the_shift_of_sampling_is_that_of_training_unless_another_is_given(tmp_path, run):
    shifted = load_checkpoint(write_run(tmp_path, time_shift=2.5))
    sampler = Sampler(shifted, SamplingConfig(num_steps=4))
    settings = sampler.settings
    assert (settings.time_shift, settings.short_name()) == (2.5, "euler-4-shift2.5-cfg1-seed0")
    assert settings.describe() == "4 Euler steps, time shift 2.5" and settings.sampling_fields()["time_shift"] == 2.5
    start = sampler.start_of([0, 1])
    expected = sample(shifted.model, start.noise, start.condition, num_steps=4, time_shift=2.5)
    assert torch.equal(sampler.run(start), expected)
    even = sampler.with_settings(SamplingConfig(num_steps=4, time_shift=1.0))
    assert even.settings.short_name() == "euler-4-cfg1-seed0" and "time_shift" not in even.settings.sampling_fields()
    assert torch.equal(even.run(start), sample(shifted.model, start.noise, start.condition, num_steps=4))
    assert fit_to_family(SamplingConfig(), load_checkpoint(run)).time_shift == 1.0


def test_another_average_of_the_weights_is_named_and_contradicts_the_trained_ones(run):
    settings = SamplingConfig(ema_decay=0.5)
    assert (settings.weights, settings.short_name()) == (0.5, "euler-50-cfg1-ema0.5-seed0")
    assert settings.sampling_fields()["ema_decay"] == 0.5 and "ema_decay" not in SamplingConfig().sampling_fields()
    loaded = load_checkpoint(run)
    own = SamplingConfig(ema_decay=loaded.config.ema_decay)
    assert fit_to_family(own, loaded).sampling_fields() == fit_to_family(SamplingConfig(), loaded).sampling_fields()
    with pytest.raises(UserError, match="^--ema-decay must be left out with --no-ema, got 0.5$"):
        SamplingConfig(ema_decay=0.5, ema=False).check()


def test_a_cache_runs_and_warms_up_on_shifted_times(run):
    settings = SamplingConfig(num_steps=8, cache="newton", interval=3, order=1, time_shift=3.0)
    sampler = Sampler(load_checkpoint(run), settings)
    sampler.warm_up(2)
    start = sampler.start_of([0, 1])
    found = sampler.run(start)
    assert sampler.calls == (8, 4)
    uncached = sampler.with_settings(SamplingConfig(num_steps=8, time_shift=3.0)).run(start)
    assert (found - uncached).abs().mean() < 0.2
    full = sampler.with_full_steps(range(8))
    torch.testing.assert_close(full.run(start), uncached)
    assert (full.with_settings(replace(full.settings, time_shift=1.0)).run(start) - uncached).abs().mean() > 0.01


def test_guidance_without_a_null_class_is_refused(tmp_path):
    run = write_run(tmp_path, cfg_prob=0.0)
    with pytest.raises(UserError, match="--cfg-scale must be 1 for a model trained with --cfg-prob 0, got 1.5"):
        Sampler(load_checkpoint(run), SamplingConfig(cfg_scale=1.5))


def test_the_settings_that_decide_the_images_leave_out_an_unused_cache():
    assert "interval" not in SamplingConfig().sampling_fields()
    assert SamplingConfig(cache="taylor", interval=7).sampling_fields()["interval"] == 7


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "euler-50-cfg1-seed0"),
        ({"heun": True, "num_steps": 25, "cfg_scale": 1.5, "global_seed": 3}, "heun-25-cfg1.5-seed3"),
        ({"mode": "sde", "cfg_scale": 1.8, "guidance_high": 0.7}, "euler-maruyama-50-cfg1.8-from0-to0.7-seed0"),
        ({"labels": "balanced"}, "euler-50-cfg1-seed0-balanced"),
        ({"labels": "3,1,4", "cache": "reuse"}, "euler-50-cfg1-seed0-labels3_1_4-reuse-module-i4-o0"),
        ({"cache": "newton", "granularity": "model"}, "euler-50-cfg1-seed0-newton-model-i4-o4"),
        ({"cache": "taylor", "full_steps": "0,1,5", "order": 1}, "euler-50-cfg1-seed0-taylor-module-full0_1_5-o1"),
        ({"labels": "0,1,2,3,4,5,6,7,8,9,1"}, "euler-50-cfg1-seed0-labels11_e5dddffe"),
        ({"cache": "taylor", "error_threshold": 0.1}, "euler-50-cfg1-seed0-taylor-module-e0.1-i10-o4"),
        ({"cache": "delta-dit", "gate": 30, "cached_blocks": 21}, "euler-50-cfg1-seed0-delta-dit-i2-g30-n21"),
    ],
)
def test_the_name_of_a_folder_tells_what_people_vary(settings, name):
    assert SamplingConfig(**settings).short_name() == name


@pytest.mark.parametrize(("mode", "rows"), [("batched", 6), ("separate", 3)])
def test_a_warm_up_takes_no_more_memory_than_drawing(run, mode, rows):
    sampler = Sampler(load_checkpoint(run), SamplingConfig(cfg_scale=2.0, guidance_mode=mode))
    seen = []
    sampler.loaded.model.register_forward_pre_hook(lambda model, inputs: seen.append(len(inputs[0])))
    sampler.warm_up(3)
    assert seen == [rows]


def test_guidance_in_two_halves_draws_the_same(run):
    student, settings = load_checkpoint(run), {"num_steps": 8, "cfg_scale": 2.0, "guidance_high": 0.7}
    batched, separate = (
        Sampler(student, SamplingConfig(**settings, guidance_mode=mode)) for mode in ("batched", "separate")
    )
    difference = batched.sample(range(5))[0].astype(int) - separate.sample(range(5))[0].astype(int)
    assert np.abs(difference).max() <= 1
    assert batched.calls == (8, 8) and separate.calls == (13, 13)  # guided at 0.625, 0.5, 0.375, 0.25 and 0.125


def classes_or_sentence(policy: str) -> None:
    """What a command makes of --labels, for a model of ten classes."""
    try:
        chosen = choose_labels(list_labels(policy), 0, range(5), 10)
    except UserError as error:
        assert str(error).startswith("--labels ") and "\n" not in str(error)
    else:
        assert chosen.dtype == "int64" and chosen.shape == (5,) and 0 <= chosen.min() <= chosen.max() < 10


@given(st.one_of(st.text(), st.text("0123456789,-+_ \n~/\0", max_size=30)))
def test_any_text(policy):
    classes_or_sentence(policy)


@pytest.mark.parametrize("policy", ["9" * 5000, "9" * 30, "~nobody-of-this-name/x", "a\0b", "x" * 5000, "٣", "1_0", ""])
def test_text_that_libraries_trip_over(policy):
    with pytest.raises(UserError, match="--labels "):
        choose_labels(list_labels(policy), 0, range(5), 10)


def test_no_text_at_all_is_shown():
    with pytest.raises(UserError, match="got ''$"):
        choose_labels("", 0, range(5), 10)


@given(st.one_of(st.binary(), st.lists(st.integers(-2, 12)).map(lambda n: "\r\n".join(map(str, n)).encode())))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_any_bytes(tmp_path, content):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    classes_or_sentence(str(path))


def test_a_file_as_windows_writes_it(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbf3\r\n1\r\n")
    assert list_labels(str(path)) == "3,1"


def test_a_file_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("haste.generation.config.LARGEST_FILE", 10)
    (tmp_path / "labels.txt").write_text("1\n" * 6)
    with pytest.raises(UserError, match="--labels must be a text file, .* at most 10 "):
        list_labels(str(tmp_path / "labels.txt"))


def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    classes_or_sentence(str(tmp_path / "pipe"))


@pytest.fixture
def student(tmp_path):
    return load_checkpoint(write_ours(tmp_path / "0000000.pt", tmp_path / "vae"))


def test_latents_are_decoded_by_the_vae_of_the_checkpoint(student, tmp_path):
    images, labels = Sampler(student, SamplingConfig(num_steps=3, labels="3,1")).sample(range(3))
    generators = [image_generator(0, index, "noise") for index in range(3)]
    drawn = sample(student.model, initial_noise((3, 4, 4, 4), generators), torch.tensor([3, 1, 3]), num_steps=3)
    wanted = to_uint8(VAE(LatentFormat.of(str(tmp_path / "vae"))).decode(drawn))
    assert images.shape == (3, IMAGE, IMAGE, 3) and (images == wanted).all() and images.std() > 1
    assert labels.tolist() == [3, 1, 3]


def test_another_decoder_keeps_the_scale_that_the_model_was_trained_with(student, tmp_path):
    student.recorded["latents"]["scale"] = (1.0, 2.0, 3.0, 4.0)
    other = save_vae(tmp_path / "finetuned")
    latents = latent_format(student, str(other))
    assert latents == replace(LatentFormat.of(str(other)), scale=(1.0, 2.0, 3.0, 4.0))


def test_a_vae_that_does_not_fit_is_refused(student, tmp_path):
    with pytest.raises(UserError, match="--vae must have 4 channels and 4 pixels per latent, .* got mse with 4 and 8"):
        latent_format(student, "mse")
    wide = save_vae(tmp_path / "wide", channels=16)
    bare = load_checkpoint(write_bare(tmp_path / "bare.pt"))
    with pytest.raises(UserError, match="--vae must have latents of 4 channels, .* with 16"):
        latent_format(bare, str(wide))
    with pytest.raises(UserError, match="--vae must be mse, ema, .*which does not exist"):
        Sampler(student, SamplingConfig(vae="./none"))


def test_a_student_of_pixels_has_none(tmp_path):
    student = load_checkpoint(write_run(tmp_path))
    assert latent_format(student) is None
    with pytest.raises(UserError, match="--vae must have latents of 1 channels, .* ema with 4"):
        latent_format(student, "ema")
    with pytest.raises(UserError, match="--vae must be left out for a model of pixels, got ema"):
        latent_format(replace(student, recorded={"latents": None}), "ema")


def test_other_trainers_latents_are_those_of_the_published_vae(tmp_path):
    student = load_checkpoint(write_repas(tmp_path / "0400000.pt"))
    assert latent_format(student) == replace(SD_LATENTS, vae=PUBLISHED_VAES["ema"])
    assert latent_format(student, "mse") == SD_LATENTS


def test_one_vae_decodes_a_run_that_was_gone_on_with(tmp_path):
    """REPA's checkpoint names none; ours names that of Stable Diffusion which made the latents."""
    student = load_checkpoint(write_ours(tmp_path / "0000000.pt", tmp_path / "vae"))
    student.recorded["latents"] = asdict(SD_LATENTS)
    assert latent_format(student) == latent_format(load_checkpoint(write_repas(tmp_path / "0400000.pt")))
    assert latent_format(student, "mse") == SD_LATENTS
    student.config.vae = "mse"  # which the run was told
    assert latent_format(student) == SD_LATENTS
