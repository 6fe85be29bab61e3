from __future__ import annotations

import json
import re

import pytest
from digits_run import write_run
from haste import digits
from haste.cli.main import main
from haste.digits import ClassifierConfig
from haste.metrics import evaluator
from haste.resumable import hold
from PIL import Image
from text_run import write_text_run

QUICK = ("--steps", "8", "--num-steps", "4", "--num-fid-samples", "70", "--repeats", "1")
GRID = ("--caches", "taylor", "reuse", "--granularities", "model", "--intervals", "3", "--orders", "1", "9")


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "exps")


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste sweep:")]
    assert len(errors) == 1
    return errors[0]


def test_records_table_plot_and_advice_of_a_run(run, tmp_path, capsys, caplog):
    main(["sweep", "--ckpt", str(run), *QUICK, *GRID])
    out = capsys.readouterr().out
    folder = run / "sweep"
    records = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert [(r["point"]["cache"], r["point"]["num_steps"]) for r in records] == [
        ("none", 8), ("none", 4), ("taylor", 8), ("reuse", 8),
    ]  # fmt: skip
    assert records[0]["sweep"]["checkpoint"] == "0000004.pt" and records[0]["sweep"]["settings"]["labels"] == "balanced"
    assert "skipped: Taylor per model, interval 3, order 9, 8 steps: --order must be at most" in out
    assert "70 samples in 64 feature dimensions and is biased upwards" in caplog.text
    table = (folder / "sweep.md").read_text()
    for record in records:
        fd = f"{record['fd']:.3f}"
        assert fd in out and fd in table
    assert re.search(r"^8 uncached steps +8/8 +[\d.,]+ +1\.00× ", out, re.MULTILINE)
    assert re.search(r"^Taylor per model, interval 3, order 1, 8 steps +4/8 ", out, re.MULTILINE)
    assert "The fastest uncached run with such an FD" in out and "The fastest uncached run with such an FD" in table
    Image.open(folder / "sweep.png").verify()
    assert len(list((tmp_path / "exps" / "classifier").iterdir())) == 1  # beside the runs


def test_a_model_of_text_is_swept_with_prompts(tmp_path, capsys):
    run = write_text_run(tmp_path / "exps")
    (tmp_path / "prompts.txt").write_text("a red temple\na dark flower\n")
    grid = ("--caches", "taylor", "--granularities", "model", "--intervals", "3", "--orders", "1")
    flags = ("--ckpt", str(run), *QUICK, *grid, "--features", "digits", "--cfg-scale", "2")
    main(["sweep", *flags, "--prompts", str(tmp_path / "prompts.txt")])
    records = [json.loads(line) for line in (run / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [record["point"]["cache"] for record in records] == ["none", "none", "taylor"]
    assert records[0]["sweep"]["settings"]["prompts"].startswith("2 prompts, ")
    assert all(record["label_accuracy"] is None and record["fd"] > 0 for record in records)
    assert records[2]["psnr"] > 0 and "The fastest uncached run" in capsys.readouterr().out
    assert "--labels must be left out" in refusal(capsys, *flags, "--labels", "3,1")


def test_a_folder_of_something_else_or_of_a_sweep_that_runs_is_refused(run, capsys):
    folder = run / "other"
    folder.mkdir()
    (folder / "sweep.md").write_text("mine")
    flags = ("--ckpt", str(run), *QUICK, "--output", str(folder))
    assert "--output must be a new folder, or one with a sweep, got" in refusal(capsys, *flags)
    assert [path.name for path in folder.iterdir()] == ["sweep.md"]
    with hold(run / "busy", "it is"):
        assert "busy is in use by this process" in refusal(capsys, *flags[:-1], str(run / "busy"))


def test_a_second_start_measures_nothing_and_the_records_alone_draw_the_same(run, capsys, monkeypatch):
    flags = ("--ckpt", str(run), *QUICK, *GRID, "--output", str(run / "elsewhere"))
    main(["sweep", *flags])
    first = capsys.readouterr().out
    records = (run / "elsewhere" / "sweep.jsonl").read_text()
    table = (run / "elsewhere" / "sweep.md").read_text()
    main(["sweep", *flags])
    assert capsys.readouterr().out == first
    assert (run / "elsewhere" / "sweep.jsonl").read_text() == records

    (run / "elsewhere" / "sweep.md").unlink()
    monkeypatch.setattr("haste.sweep.measure.load_checkpoint", None)
    main(["sweep", "--ckpt", "gone", "--output", str(run / "elsewhere"), "--plot-only"])
    assert (run / "elsewhere" / "sweep.md").read_text() == table


def test_every_granularity_can_be_swept(run, capsys):
    granularities = ("module", "block", "model", "output")
    main(["sweep", "--ckpt", str(run), *QUICK, "--caches", "taylor", "--granularities", *granularities,
          "--intervals", "3", "--orders", "1"])  # fmt: skip
    records = [json.loads(line) for line in (run / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [record["point"].get("granularity") for record in records[2:]] == list(granularities)
    assert all("fd" in record and record["seconds"] for record in records)
    assert "Taylor per output" in capsys.readouterr().out
    Image.open(run / "sweep" / "sweep.png").verify()


def test_guidance_is_part_of_a_sweep(run, capsys):
    main(["sweep", "--ckpt", str(run), *QUICK, "--caches", "reuse", "--granularities", "model", "--intervals", "3",
          "--cfg-scale", "2", "--guidance-high", "0.6"])  # fmt: skip
    records = [json.loads(line) for line in (run / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert all(record["sweep"]["settings"]["cfg_scale"] == 2 for record in records)
    assert "guidance 2" in (run / "sweep" / "sweep.md").read_text()


def test_a_run_on_other_images_needs_to_be_told_what_measures(tmp_path, capsys):
    run = write_run(tmp_path / "exps", data_dir="data/imagenet")
    assert "--features must be given" in refusal(capsys, "--ckpt", str(run))


def test_too_few_samples_are_refused_before_the_real_side_is_read(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "load_reference", lambda *_: pytest.fail("the real side was read"))
    assert "--num-fid-samples must be above 64" in refusal(capsys, "--ckpt", str(run), "--num-fid-samples", "64")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-fid-samples", "0"), "--num-fid-samples must be an integer from 1 to 10,000,000, got 0"),
        (("--num-fid-samples", "64"), "--num-fid-samples must be above 64, the number of features, for an FD, got 64"),
        (("--repeats", "0"), "--repeats must be an integer from 1 to 10,000, got 0"),
        (("--num-steps", "0"), "--num-steps must be an integer from 1 to 10,000, got 0"),
        (("--steps",), "--steps must have one value or more, got none"),
        (("--caches",), "--caches must have one value or more, got none"),
        (("--mode", "sde", "--heun"), "--heun must come with --mode ode, got --mode sde"),
        (("--classifier-dir", __file__), f"--classifier-dir must be a folder, got {__file__}"),
        (("--intervals", "3", "1000000000"), "--intervals must be an integer from 1 to 10,000, got 1000000000"),
        (("--error-thresholds", "0", "nan"), "--error-thresholds must be a number from 0 to 1,000,000, got nan"),
        (("--tolerance", "-1"), "--tolerance must be a number from 0 to 1,000,000, got -1.0"),
        (("--reference", "nowhere"), "nowhere, which does not exist"),
        (("--features", "stored"), "--features must be a network, as images are sampled, got stored"),
        (("--features", "inception:weights.pth"), "--reference must be given with --features inception:weights.pth"),
        (("--plot-only",), "--plot-only needs an earlier sweep, got "),
    ],
)
def test_bad_flags_get_a_sentence_and_leave_nothing(run, capsys, flags, message):
    assert message in refusal(capsys, "--ckpt", str(run), *flags)
    assert not (run / "sweep").exists()
