from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch
from digits_run import write_run
from drawn_images import read_images, read_npz
from haste.caching import FAST, fast_config, memory
from haste.cli.main import main
from haste.generation import sample_dir
from haste.generation.config import SampleConfig
from haste.generation.sample_dir import SampleDir
from haste.training.checkpoint import as_before
from PIL import Image

QUICK = ("--num-steps", "4", "--num-fid-samples", "6")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "exps")


def refusal(capsys, *arguments) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["sample", *arguments])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste sample:")]
    assert len(errors) == 1
    return errors[0]


def test_images_npz_and_grid_of_a_run(run, capsys):
    main(["sample", "--ckpt", str(run), *QUICK, "--labels", "3,1"])
    folder = run / "samples" / "0000004-euler-4-cfg1-seed0-labels3_1"
    images, labels = read_npz(folder.with_name(folder.name + ".npz"))
    assert images.shape == (6, 8, 8, 3) and labels.tolist() == [3, 1, 3, 1, 3, 1]
    assert (read_images(folder) == images).all()
    assert Image.open(folder / "000000.png").size == (8, 8)  # the native size; only the grid is enlarged
    assert Image.open(folder.with_name(folder.name + "-grid.png")).width > 300
    out = capsys.readouterr().out
    assert re.search(r"6 images at \d+\.\d images/s \(\d+\.\d\d s for 6\); 4 of 4 model calls were full", out)
    assert str(folder) in out


def test_taylor_computes_fewer_steps_and_draws_nearly_the_same(run, capsys):
    flags = ("--ckpt", str(run), "--num-steps", "12", "--num-fid-samples", "6")
    main(["sample", *flags])
    main(["sample", *flags, "--cache", "taylor", "--interval", "3", "--order", "1"])
    assert "5 of 12 model calls were full" in capsys.readouterr().out  # 0, 1, 4, 7, 10
    full, _ = read_npz(run / "samples" / "0000004-euler-12-cfg1-seed0.npz")
    cached, _ = read_npz(run / "samples" / "0000004-euler-12-cfg1-seed0-taylor-module-i3-o1.npz")
    difference = np.abs(full.astype(int) - cached.astype(int))
    assert 0 < difference.mean() < 0.2 * full.std()


def test_a_command_that_was_killed_goes_on_with_what_is_missing(run, monkeypatch):
    class Killed(BaseException):
        pass

    count = SampleDir.count

    def count_to_four(self, *what):
        count(self, *what)
        if self.sampled.images == 4:
            raise Killed

    args = SampleConfig(ckpt=run, num_steps=3, num_fid_samples=7, per_proc_batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(SampleDir, "count", count_to_four)
        with pytest.raises(Killed):
            sample_dir.sample_to_folder(args)
    folder = run / "samples" / "0000004-euler-3-cfg1-seed0"
    assert len(list(folder.glob("*.png"))) == 4 and not folder.with_name(folder.name + ".npz").exists()
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}

    resumed = sample_dir.sample_to_folder(args)
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    assert resumed.sampled.images == 7

    whole = sample_dir.sample_to_folder(SampleConfig(**{**vars(args), "sample_dir": run / "elsewhere"}))
    assert (whole.images == resumed.images).all()  # byte for byte, as the batches are the same


def test_a_second_start_draws_nothing_and_a_larger_number_adds(run, capsys):
    main(["sample", "--ckpt", str(run), *QUICK])
    folder = run / "samples" / "0000004-euler-4-cfg1-seed0"
    record = (folder / "sample.json").read_text()
    before = read_images(folder)
    assert "there already" not in capsys.readouterr().out
    main(["sample", "--ckpt", str(run), *QUICK])
    assert capsys.readouterr().out.startswith("6 images were there already\n")
    assert (folder / "sample.json").read_text() == record
    main(["sample", "--ckpt", str(run), *QUICK, "--num-fid-samples", "3"])
    npz = folder.with_name(folder.name + ".npz")
    assert len(read_npz(npz)[0]) == 3 and f"{npz}, the first 3 of the folder's 6 images\n" in capsys.readouterr().out
    main(["sample", "--ckpt", str(run), *QUICK, "--num-fid-samples", "8"])
    assert json.loads((folder / "sample.json").read_text())["sampled"]["images"] == 8
    assert (read_images(folder)[:6] == before).all()


def test_a_folder_of_another_command_is_refused(run, capsys):
    main(["sample", "--ckpt", str(run), *QUICK])
    message = refusal(capsys, "--ckpt", str(run), *QUICK, "--no-ema")
    assert "--sample-dir must be another folder" in message and "ema True, not False" in message


def test_a_checkpoint_that_was_trained_again_does_not_mix_with_its_old_samples(run, capsys):
    main(["sample", "--ckpt", str(run), *QUICK])
    checkpoint = run / "checkpoints" / "0000004.pt"
    checkpoint.touch()
    main(["sample", "--ckpt", str(run), *QUICK])  # its content is the same
    checkpoint.write_bytes((run / "checkpoints" / "0000002.pt").read_bytes())
    message = refusal(capsys, "--ckpt", str(run), *QUICK)
    assert re.search("--sample-dir .* with the checkpoint's content [0-9a-f]{12}, not [0-9a-f]{12}", message)


def test_a_folder_of_an_earlier_version_knows_its_checkpoint_by_the_time_it_was_written(run, capsys):
    main(["sample", "--ckpt", str(run), *QUICK])
    checkpoint = run / "checkpoints" / "0000004.pt"
    path = run / "samples" / "0000004-euler-4-cfg1-seed0" / "sample.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "settings": as_before(record["settings"], checkpoint)}))
    main(["sample", "--ckpt", str(run), *QUICK])
    os.utime(checkpoint, ns=(1, 1))
    assert "the checkpoint's time " in refusal(capsys, "--ckpt", str(run), *QUICK)


def test_fast_is_the_recommended_cache(run, capsys):
    steps = ("--num-steps", "12", "--num-fid-samples", "6")
    main(["sample", "--ckpt", str(run), *steps, "--fast"])
    (folder,) = [path for path in (run / "samples").iterdir() if path.is_dir()]
    record = json.loads((folder / "sample.json").read_text())
    chosen = fast_config(12, noisy=False).cache_fields()
    assert chosen["interval"] < FAST.interval and chosen.items() <= record["settings"].items()
    assert record["sampled"]["full_per_image"] < record["sampled"]["calls_per_image"] == 12
    written = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    main(["sample", "--ckpt", str(run), *steps, *written])  # the same command, so nothing is left to draw
    assert json.loads((folder / "sample.json").read_text()) == record
    for flags in (("--cache", "taylor"), ("--interval", "3"), ("--first-enhance", "2")):
        message = f"{flags[0]} must be left out with --fast, which sets it, got {flags[1]}"
        assert message in refusal(capsys, "--ckpt", str(run), "--fast", *flags)
    message = "--num-steps must be at least 8 for --fast, which forecasts most of many steps, got 4"
    assert message in refusal(capsys, "--ckpt", str(run), "--fast", "--num-steps", "4")


def test_fast_forecasts_less_boldly_where_every_step_adds_noise(run):
    main(["sample", "--ckpt", str(run), "--num-steps", "12", "--num-fid-samples", "2", "--mode", "sde", "--fast"])
    (folder,) = [path for path in (run / "samples").iterdir() if path.is_dir()]
    assert json.loads((folder / "sample.json").read_text())["settings"]["order"] == 1 < FAST.order


def test_cuda_graphs_want_a_gpu_and_a_cache(run, capsys):
    assert "--cuda-graphs must come with a cache" in refusal(capsys, "--ckpt", str(run), "--cuda-graphs")
    if not torch.cuda.is_available():
        message = "the model must be on a GPU for CUDA graphs, got cpu"
        assert message in refusal(capsys, "--ckpt", str(run), "--cuda-graphs", "--fast")


def test_full_steps_that_were_measured_hold_for_all_images_and_are_kept(run, caplog):
    """Some images alone decide, so neither the batch nor a resumption changes an image."""
    settings = {"ckpt": run, "num_steps": 20, "cache": "taylor", "error_threshold": 0.05, "num_fid_samples": 10}
    whole = sample_dir.sample_to_folder(SampleConfig(**settings, sample_dir=run / "whole"))
    steps = whole.folder.full_steps
    assert steps[:2] == [0, 1] and 2 < len(steps) < 20
    assert whole.sampled.full_per_image == len(steps)
    record = whole.folder.path / "sample.json"
    assert json.loads(record.read_text())["full_steps"] == steps

    parts = SampleConfig(**settings, sample_dir=run / "parts", per_proc_batch_size=3)
    assert np.abs(sample_dir.sample_to_folder(parts).images.astype(int) - whole.images.astype(int)).max() <= 1
    kept = [0, 1, 2, 3, 4, 9, 15]
    record.write_text(json.dumps({**json.loads(record.read_text()), "full_steps": kept}))
    (whole.folder.path / "000009.png").unlink()
    again = sample_dir.sample_to_folder(SampleConfig(**settings, sample_dir=run / "whole"))
    assert again.sampled.full_per_image == len(kept)


def test_full_steps_that_are_measured_depend_on_no_number_of_images(run):
    """Nor on the batch: 1, 2 and 12 images of this model, drawn as one batch each, would give three lists."""
    found = []
    for count, batch in ((1, 8), (12, 12), (12, 2)):
        settings = {"num_steps": 20, "cache": "taylor", "error_threshold": 0.15, "per_proc_batch_size": batch}
        folder = run / f"{count}-{batch}"
        config = SampleConfig(ckpt=run, num_fid_samples=count, sample_dir=folder, **settings)
        samples = sample_dir.sample_to_folder(config)
        found.append(samples.folder.full_steps)
    assert found[0] == found[1] == found[2] and len(found[0]) == 9


def test_an_order_above_what_few_full_steps_allow_is_no_obstacle_to_measuring_them(run):
    settings = {"ckpt": run, "num_steps": 6, "cache": "taylor", "error_threshold": 1e6, "num_fid_samples": 2}
    assert len(sample_dir.sample_to_folder(SampleConfig(**settings)).folder.full_steps) < 5


def test_a_cache_that_does_not_fit_into_memory_is_refused_before_the_first_step(run, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    flags = ("--ckpt", str(run), *QUICK, "--cache", "taylor", "--interval", "2", "--order", "1")
    assert "the cache per module takes" in refusal(capsys, *flags, "--cfg-scale", "2")
    assert not (run / "samples").exists()
    main(["sample", *flags, "--per-proc-batch-size", "2"])


@pytest.mark.parametrize("cached", [(), ("--cache", "taylor", "--interval", "3", "--order", "1")])
def test_compiled_it_draws_the_same(run, monkeypatch, cached):
    real, compiled = torch.compile, []

    def quick(function, **options):
        compiled.append(options)
        return real(function, **{**options, "backend": "aot_eager"})

    flags = ("sample", "--ckpt", str(run), "--num-steps", "8", "--num-fid-samples", "4", *cached)
    main([*flags, "--sample-dir", str(run / "eager")])
    assert not compiled
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", quick)
        main([*flags, "--sample-dir", str(run / "compiled"), "--compile"])
    assert compiled and all(options["fullgraph"] for options in compiled)
    eager, other = (read_npz(next((run / name).glob("*.npz")))[0].astype(int) for name in ("eager", "compiled"))
    assert np.abs(eager - other).max() <= 1


def test_labels_from_a_file(run, tmp_path, capsys):
    path = tmp_path / "labels.txt"
    path.write_text("7\n0\n\n3\n")
    main(["sample", "--ckpt", str(run), *QUICK, "--labels", str(path)])
    assert read_npz(next((run / "samples").glob("*.npz")))[1].tolist() == [7, 0, 3, 7, 0, 3]
    path.write_text("7\n0\n5\n")  # another content is another command
    main(["sample", "--ckpt", str(run), *QUICK, "--labels", str(path)])
    assert {path.name.rpartition("-")[2] for path in (run / "samples").glob("*.npz")} == {
        "labels7_0_3.npz",
        "labels7_0_5.npz",
    }
    for content, message in (("7\nsix\n", f"got six on line 2 of {path}"), ("\n", f"got {path}, which is empty")):
        path.write_text(content)
        refused = refusal(capsys, "--ckpt", str(run), *QUICK, "--labels", str(path))
        assert f"--labels must have a class on each line, {message}" in refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-fid-samples", "0"), "--num-fid-samples must be an integer from 1 to 10,000,000, got 0"),
        (("--per-proc-batch-size", "0"), "--per-proc-batch-size must be an integer from 1 to 1,000,000, got 0"),
        (("--num-steps", "0"), "--num-steps must be an integer from 1 to 10,000, got 0"),
        (("--cfg-scale", "0.5"), "--cfg-scale must be a number from 1 to 1,000, got 0.5"),
        (("--cfg-scale", "nan"), "--cfg-scale must be a number from 1 to 1,000, got nan"),
        (
            ("--cfg-scale", "2", "--guidance-low", "0.8", "--guidance-high", "0.7"),
            "--guidance-low must be at most --guidance-high, 0.7, got 0.8",
        ),
        (("--labels", "cats"), "--labels must be random, balanced, none, classes such as 3,1,4, or a file of them"),
        (("--labels", "3,10"), "--labels must be classes from 0 to 9, got 10 in 3,10"),
        (("--cache", "taylor", "--interval", "0"), "--interval must be an integer from 1 to 10,000, got 0"),
        (("--cache", "taylor", "--order", "-1"), "--order must be an integer from 0 to 20, got -1"),
        (("--num-steps", "1000000000"), "--num-steps must be an integer from 1 to 10,000, got 1000000000"),
        (("--cfg-scale", "inf"), "--cfg-scale must be a number from 1 to 1,000, got inf"),
        (("--cfg-scale", "1e30"), "--cfg-scale must be a number from 1 to 1,000, got 1e+30"),
        (("--cfg-scale", "2", "--guidance-low", "nan"), "--guidance-low must be a number from 0 to 1, got nan"),
        (("--cfg-scale", "2", "--guidance-high", "1.5"), "--guidance-high must be a number from 0 to 1, got 1.5"),
        (("--guidance-high", "nan"), "--guidance-high must be a number from 0 to 1, got nan"),  # also without guidance
        (("--guidance-low", "inf"), "--guidance-low must be a number from 0 to 1, got inf"),
        (
            ("--cache", "taylor", "--error-threshold", "nan"),
            "--error-threshold must be a number from 0 to 1,000,000, got nan",
        ),
        (("--global-seed", str(2**63)), "--global-seed must be an integer from 0 to 9,223,372,036,854,775,807, got"),
        (("--per-proc-batch-size", "10000000000"), "--per-proc-batch-size must be an integer from 1 to 1,000,000, got"),
        (("--mode", "sde", "--heun"), "--heun must come with --mode ode, got --mode sde"),
        (("--cache", "taylor", "--order", "14"), "--order must be at most 13, as 14 of 50 steps are full, got 14"),
    ],
)
def test_bad_flags_get_a_sentence_and_leave_nothing(run, capsys, flags, message):
    assert message in refusal(capsys, "--ckpt", str(run), *flags)
    assert not (run / "samples").exists()


def test_flags_without_effect_are_named_and_change_nothing(run, caplog):
    short = ("sample", "--ckpt", str(run), *QUICK, "--mode", "sde")
    main([*short, "--sample-dir", str(run / "short")])
    main([*short, "--sample-dir", str(run / "published"), "--guidance_low", "0.1", "--guidance-high=0.7",
          "--guided-channels", "1"])  # fmt: skip
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert [message.split()[0] for message in said] == ["--guidance-low", "--guidance-high", "--guided-channels"]
    short, published = (next((run / name).glob("*/sample.json")).parent for name in ("short", "published"))
    assert short.name == published.name and (read_images(short) == read_images(published)).all()


def test_flags_may_be_abbreviated(run):
    main(["sample", "--ck", str(run), "--num-s", "2", "--num_fid=3", "--per-proc", "2", "--cfg", "2", "--no-fu"])
    (folder,) = (run / "samples").glob("*/sample.json")
    assert folder.parent.name == "0000004-euler-2-cfg2-seed0" and len(read_images(folder.parent)) == 3


def test_a_checkpoint_that_is_missing_or_none_is_refused(run, tmp_path, capsys):
    assert "no.pt, which does not exist" in refusal(capsys, "--ckpt", str(tmp_path / "no.pt"))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "is not a valid checkpoint" in refusal(capsys, "--ckpt", str(tmp_path / "text.pt"))
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoints" in refusal(capsys, "--ckpt", str(tmp_path / "empty"))


@pytest.mark.parametrize("weight", [float("nan"), 1e38])
def test_weights_that_give_nan_stop_the_command_at_its_step(tmp_path, capsys, weight):
    run = write_run(tmp_path / "exps")
    path = run / "checkpoints" / "0000004.pt"
    content = torch.load(path, weights_only=False)
    for name in content["ema"]:
        if "final_layer" in name:
            content["ema"][name].fill_(weight)
    torch.save(content, path)
    assert "step 1 of 4, at t = 1, gave NaN or infinity" in refusal(capsys, "--ckpt", str(path), *QUICK)
    assert not list((run / "samples").glob("*/*.png"))
