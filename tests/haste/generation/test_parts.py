"""Images made in parts, from a checkpoint to files: an xAR of the digits, with random weights."""

from __future__ import annotations

import json

import haste
import numpy as np
import pytest
from digits_run import write_run
from drawn_images import read_images, read_npz
from forked_haste import start_ranks
from haste.cli.main import main
from haste.errors import UserError
from haste.generation.config import SampleConfig, SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler
from haste.generation.sample_dir import sample_to_folder
from xar_run import write_xar_run

ALL_AT_ONCE = {"cfg_scale": 2.0, "mode": "sde", "cell_steps": "9,8,6,5", "stagger": 2, "cache": "newton", "interval": 2,
               "order": 1}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_xar_run(tmp_path_factory.mktemp("exps"))


@pytest.fixture(scope="module")
def loaded(run):
    return load_checkpoint(run)


# -- an image is a function of its seed and number -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heun": True},
        {"mode": "sde"},
        {"cfg_scale": 2.0, "guidance_high": 0.7},
        {"cfg_scale": 2.0, "guidance_low": 0.3, "guidance_mode": "separate", "stagger": 2},
        {"cell_steps": "8,6,4,2"},
        {"stagger": 0, "labels": "none"},
        {"cache": "taylor", "interval": 3, "order": 1},
        ALL_AT_ONCE,
    ],
)
def test_an_image_is_the_same_in_any_batch(loaded, settings):
    sampler = Sampler(loaded, SamplingConfig(num_steps=8, global_seed=3, **settings))
    whole, labels = sampler.sample(range(5))
    parts = [sampler.sample(indices) for indices in ([0, 1], [4, 2], [3])]
    order = [0, 1, 4, 2, 3]
    assert (np.concatenate([part[1] for part in parts]) == labels[order]).all()
    difference = np.concatenate([part[0] for part in parts]).astype(int) - whole[order].astype(int)
    assert np.abs(difference).max() <= 1  # matrix products of another size round otherwise; a cut may fall between
    assert whole.shape == (5, 8, 8, 3) and whole.std() > 10


@pytest.mark.parametrize("shape", [{"entity": "scale", "entity_size": 1}, {"entity": "token", "entity_size": None},
                                   {"entity": "image", "entity_size": None}, {"class_dropout_prob": 0.0}])  # fmt: skip
def test_of_every_layout_of_parts(tmp_path, shape):
    loaded = load_checkpoint(write_xar_run(tmp_path, **shape))
    cached = Sampler(loaded, SamplingConfig(num_steps=6, cache="newton", interval=2, order=1))
    full = Sampler(loaded, SamplingConfig(num_steps=6))
    images = [sampler.sample([0])[0] for sampler in (full, cached)]
    assert images[0].shape == (1, 8, 8, 3) and (images[0] != images[1]).any()
    parts = loaded.layout.parts
    assert full.calls == (6 * parts, 6 * parts) and cached.calls == (6 * parts, 3 * parts)


def test_the_guidance_mode_affects_rounding_only(loaded):
    both = [
        Sampler(loaded, SamplingConfig(num_steps=6, cfg_scale=2.0, guidance_mode=mode)).sample(range(2))[0].astype(int)
        for mode in ("batched", "separate")
    ]
    assert np.abs(both[0] - both[1]).max() <= 1


@pytest.mark.parametrize(
    "settings, calls",
    [
        ({}, (32, 32)),
        ({"stagger": 2}, (14, 14)),
        ({"stagger": 8}, (32, 32)),
        ({"cell_steps": "8,6,4,2"}, (20, 20)),
        ({"cfg_scale": 2.0, "guidance_mode": "separate"}, (8 + 2 * 24, 8 + 2 * 24)),
        ({"cache": "newton", "interval": 3, "order": 1}, (32, 12)),
        ({"cache": "newton", "interval": 2, "order": 1, "stagger": 2}, (14, 7)),
        ({"fast": True}, (32, 16)),
    ],
)
def test_the_number_of_model_calls(loaded, settings, calls, tmp_path):
    args = SampleConfig(ckpt=tmp_path, num_steps=8, **settings).resolved()
    sampler = Sampler(loaded, haste.generation.pipeline.fit_to_family(args, loaded, args.fast))
    sampler.sample([0])
    assert sampler.calls == calls


def test_staggered_by_all_steps_and_a_cache_of_full_steps_change_nothing(loaded):
    plain = Sampler(loaded, SamplingConfig(num_steps=6, cfg_scale=2.0))
    same = plain.with_settings(SamplingConfig(num_steps=6, cfg_scale=2.0, stagger=6))
    full = plain.with_settings(SamplingConfig(num_steps=6, cfg_scale=2.0, cache="taylor", interval=1))
    assert all((plain.sample(range(3))[0] == other.sample(range(3))[0]).all() for other in (same, full))


# -- as a user -------------------------------------------------------------------------------------------------------


def test_a_command_its_files_and_its_record(run, capsys, caplog, tmp_path):
    caplog.set_level("INFO")
    flags = ["--ckpt", str(run), "--sample-dir", str(tmp_path), "--num-fid-samples", "5", "--per-proc-batch-size", "2",
             "--cell-steps", "9,8,6,5", "--stagger", "2", "--cfg-scale", "2", "--mode", "sde", "--cache", "newton",
             "--interval", "2", "--order", "1"]  # fmt: skip
    main(["sample", *flags])
    folder = tmp_path / "0000004-euler-maruyama-9_8_6_5-stagger2-cfg2-seed0-newton-output-i2-o1-even"
    images, labels = read_npz(folder.with_name(folder.name + ".npz"))
    assert images.shape == (5, 8, 8, 3) and len(labels) == 5 and (read_images(folder) == images).all()
    record = json.loads((folder / "sample.json").read_text())
    assert record["settings"]["cell_steps"] == "9,8,6,5" and record["settings"]["stagger"] == 2
    said = capsys.readouterr()
    assert f"{record['sampled']['full_per_image']} of {record['sampled']['calls_per_image']} model calls" in said.out
    assert "GFLOPs per image; keys and values of 2 images take" in caplog.text

    (folder / "000003.png").unlink()
    kept = (folder / "000002.png").stat().st_mtime_ns
    main(["sample", *flags])
    assert (read_images(folder) == images).all() and (folder / "000002.png").stat().st_mtime_ns == kept
    assert json.loads((folder / "sample.json").read_text())["sampled"]["images"] == 6


def test_two_processes_sample_what_one_does(run, tmp_path):
    settings = {"num_fid_samples": 6, "per_proc_batch_size": 2, "num_steps": 6, "stagger": 2}
    words = ["sample", "--ckpt", str(run), "--sample-dir", str(tmp_path / "two")]
    words += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    printed = [tmp_path / f"{rank}.txt" for rank in range(2)]
    for rank, said in zip(start_ranks(words, printed), printed, strict=True):
        rank.join(timeout=120)
        assert rank.exitcode == 0, said.read_text()[-3000:]
    one = sample_to_folder(SampleConfig(ckpt=run, sample_dir=tmp_path / "one", **settings)).images
    (npz,) = (tmp_path / "two").glob("*.npz")
    assert np.abs(read_npz(npz)[0].astype(int) - one.astype(int)).max() <= 1  # other numbers of threads


def test_haste_sample_in_python(loaded):
    images = haste.sample(loaded, [3, 1], num_steps=9, stagger=3, fast=True)
    assert images.shape == (2, 8, 8, 3)


def test_records_of_whole_images_are_as_before():
    fields = SamplingConfig(num_steps=7).sampling_fields()
    assert "cell_steps" not in fields and "stagger" not in fields and fields["num_steps"] == 7
    assert SamplingConfig(num_steps=7).short_name() == "euler-7-cfg1-seed0"
    described = SamplingConfig(cell_steps="50,38,26,15", stagger=12).describe()
    assert described == "50,38,26,15 Euler steps, stagger 12"


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"cell_steps": "50,38,26"}, "--cell-steps must have 4 numbers"),
        ({"cell_steps": "50,,26,15"}, "--cell-steps must be numbers"),
        ({"cell_steps": "50,38,26,0"}, "--cell-steps must be"),
        ({"stagger": 51}, "--stagger must be at most the number of steps, 50"),
        ({"stagger": 20, "cell_steps": "15,12,9,6"}, "--stagger must be at most the number of steps, 15"),
        ({"stagger": -1}, "--stagger must be"),
        ({"stagger": 5, "heun": True}, "--stagger must be left out with --heun"),
        ({"cache": "delta-dit"}, "--cache must be"),
        ({"cache": "taylor", "granularity": "model"}, "--granularity must be output"),
        ({"cache": "taylor", "error_threshold": 0.1}, "--error-threshold must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_their_flag(loaded, settings, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        Sampler(loaded, SamplingConfig(**settings))


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"interval": 7}, "--interval must be at most the number of steps, 6"),
        ({"full_steps": "0,7"}, "--full-steps must be"),
        ({"interval": 3, "order": 9}, "--order must be"),
    ],
)
def test_settings_of_a_cache_that_the_steps_of_a_part_do_not_allow(loaded, settings, flag):
    sampler = Sampler(loaded, SamplingConfig(cell_steps="12,10,8,6", cache="newton", **settings))
    with pytest.raises(UserError, match=f"^{flag}"):
        sampler.sample([0])


@pytest.mark.parametrize("settings", [{"cell_steps": "5,5"}, {"cell_steps": "5"}, {"stagger": 3}])
def test_a_family_that_makes_whole_images_refuses_them(tmp_path, settings):
    flag = next(iter(settings)).replace("_", "-")
    with pytest.raises(UserError, match=f"^--{flag} must be left out for this SiT"):
        haste.sample(write_run(tmp_path), 3, num_steps=5, **settings)


@pytest.mark.parametrize(
    ("flag", "wanted"), [("--compile", "--compile must be left out for xAR"), ("--cuda-graphs", "on a GPU")]
)
def test_what_is_not_there_for_parts_is_refused(run, tmp_path, capsys, flag, wanted):
    with pytest.raises(SystemExit):
        main(["sample", "--ckpt", str(run), "--sample-dir", str(tmp_path), flag])
    assert wanted in capsys.readouterr().err


def test_fast_names_the_flag_that_says_how_many_steps_there_are(run):
    with pytest.raises(UserError, match="^--cell-steps must be at least 8 for --fast"):
        SampleConfig(ckpt=run, cell_steps="50,38,26,7", fast=True).resolved()
    resolved = SampleConfig(ckpt=run, cell_steps="50,38,26,15", fast=True).resolved()
    assert resolved.interval == 3  # a quarter of the shortest part
