from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from digits_run import write_run
from haste import digits, plotting
from haste.cli.main import main
from haste.data.images import write_image
from haste.digits import ClassifierConfig, real_digits
from haste.evaluation.records import read_evaluations
from haste.metrics import evaluator
from PIL import Image

QUICK = ("--num-steps", "2", "--num-fid-samples", "70")
METRICS = ["fd", "kid", "precision", "recall", "density", "coverage", "inception_score"]


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))


@pytest.fixture(autouse=True)
def no_grid(monkeypatch):
    """The grid that is drawn with all samples, which takes longer than these."""
    monkeypatch.setattr(plotting, "plot_grid", lambda *args, **kwargs: None)


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *map(str, arguments)])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste evaluate:")]
    assert len(errors) == 1
    return errors[0]


def row(out: str, name: str) -> str:
    """What stands behind the name of a metric."""
    (found,) = re.findall(rf"^{re.escape(name)}  +(.+)$", out, re.MULTILINE)
    return found


def write_digits(folder: Path, count: int) -> Path:
    for index, image in enumerate(real_digits()[0][:count]):
        write_image(folder / f"{index:06d}.png", image)
    return folder


@pytest.fixture
def teacher(tmp_path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 16}
    tf.Dinov2Model(tf.Dinov2Config(**shape, image_size=8, patch_size=4)).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


# ---- the checkpoints of a run on the digits ----


def test_every_checkpoint_of_a_run(tmp_path, capsys, caplog):
    run = write_run(tmp_path)
    main(["evaluate", "--run", str(run), *QUICK])
    out = capsys.readouterr().out
    records = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert re.search(
            rf"^ *{record['step']} +{record['fd']:.3f} +{record['label_accuracy']:.1%}$", out, re.MULTILINE
        )
        assert record["samples"] == 70 and record["num_steps"] == 2
    assert "70 samples in 64 feature dimensions and is biased upwards" in caplog.text
    for image in ("evaluation.png", "losses.png"):
        Image.open(run / image).verify()
    assert len(list((tmp_path / "classifier").iterdir())) == 1  # beside the runs

    main(["evaluate", "--run", str(run), *QUICK])
    assert capsys.readouterr().out == out
    assert len((run / "evaluation.jsonl").read_text().splitlines()) == 2


def test_a_run_on_other_data_is_refused_before_a_classifier_is_trained(tmp_path, capsys):
    run = write_run(tmp_path, data_dir="imagenet")
    assert "of 'imagenet'" in refusal(capsys, "--run", run, *QUICK)
    assert not (tmp_path / "classifier").exists()


# ---- any images, all metrics ----


def test_a_checkpoint_its_samples_and_its_run_get_the_same_scores(tmp_path, capsys):
    run = write_run(tmp_path)
    main(["evaluate", "--run", str(run), *QUICK])
    (first, _) = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    main(["evaluate", "--ckpt", str(run / "checkpoints" / "0000002.pt"), *QUICK])
    out = capsys.readouterr().out
    # Drawn in other batches: a grey level.
    assert float(row(out, "FD")) == pytest.approx(first["fd"], rel=0.01)
    assert row(out, "label accuracy") == f"{first['label_accuracy']:.1%}"
    assert "two halves of these have an FD of" in out and "biased upwards" in out

    folder = run / "samples" / "0000002-euler-2-cfg1-seed0-balanced"
    for samples in (folder, folder.with_name(folder.name + ".npz")):
        main(["evaluate", "--samples", str(samples), "--classifier-dir", str(tmp_path / "classifier")])
        again = capsys.readouterr().out
        for name in ("FD", "precision (k = 3)", "Inception score", "label accuracy"):
            assert row(again, name) == row(out, name)

    kept = read_evaluations(folder.with_name(folder.name + "-evaluation.json"))
    assert len(kept) == 2 and kept[0]["settings"]["digest"] != kept[1]["settings"]["digest"]  # the folder, the .npz
    assert list(kept[0]["metrics"]) == [*METRICS, "label_accuracy"]
    assert kept[0]["settings"]["count"] == 70 and kept[0]["settings"]["reference_count"] == 1797
    assert kept[0]["metrics"]["kid"]["value"] is None


def test_images_without_labels_have_no_accuracy(tmp_path, capsys):
    main(["evaluate", "--samples", str(write_digits(tmp_path / "set", 70)), "--kid-subset-size", "50"])
    out = capsys.readouterr().out
    assert "label accuracy" not in out and re.match(r"-?0\.\d+ ± 0\.\d+", row(out, "KID"))


def test_labels_belong_to_the_numbers_that_are_there(tmp_path, capsys):
    """Labels in turn: without image 0 the others still show what they should."""
    images, labels = real_digits()
    for label in range(10):
        write_image(tmp_path / "set" / f"{label:06d}.png", images[np.flatnonzero(labels == label)[0]])
    record = {"settings": {"labels": "balanced", "global_seed": 0}, "drawn": {}}
    (tmp_path / "set" / "sample.json").write_text(json.dumps(record))
    main(["evaluate", "--samples", str(tmp_path / "set")])
    (tmp_path / "set" / "000000.png").unlink()
    main(["evaluate", "--samples", str(tmp_path / "set")])
    both, fewer = re.findall(r"^label accuracy +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert float(both) > 50 and float(fewer) > 50  # one pass over the digits; moved by one they would be near 0


def test_a_teachers_features_against_images_and_what_was_saved_of_them(tmp_path, teacher, capsys):
    samples, real = write_digits(tmp_path / "set", 60), write_digits(tmp_path / "real", 90)
    main(["evaluate", "--samples", str(samples), "--features", str(teacher), "--reference", str(real),
          "--save-reference", str(tmp_path / "real.npz")])  # fmt: skip
    first = capsys.readouterr().out
    assert "60 samples against 90 real images" in first and "12 features of class token" in first
    main(["evaluate", "--samples", str(samples), "--features", str(teacher), "--reference", str(tmp_path / "real.npz")])
    second = capsys.readouterr().out
    for name in ("FD", "recall (k = 3)", "density (k = 5)"):
        assert row(second, name) == row(first, name)
    assert row(second, "Inception score") == "–" and "without class probabilities" in second


def test_every_checkpoint_of_a_run_in_a_teachers_features(tmp_path, teacher, capsys):
    run = write_run(tmp_path)
    few = ("--num-steps", "2", "--num-fid-samples", "14")
    main(["evaluate", "--run", str(run), *few, "--features", str(teacher), "--reference", "digits"])
    out = capsys.readouterr().out
    assert re.search(r"^ +step +FD +precision", out, re.MULTILINE)
    for step in ("0000002", "0000004"):
        (record,) = read_evaluations(run / "samples" / f"{step}-euler-2-cfg1-seed0-balanced-evaluation.json")
        assert re.search(rf"^{step} +{record['metrics']['fd']['value']:.3f} ", out, re.MULTILINE)


def test_stored_features_on_both_sides(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.standard_normal((400, 4)))
    np.savez(tmp_path / "b.npz", features=rng.standard_normal((400, 4)) + 1.0)
    main(["evaluate", "--samples", str(tmp_path / "a.npy"), "--features", "stored",
          "--reference", str(tmp_path / "b.npz"), "--kid-subset-size", "100"])  # fmt: skip
    assert float(row(capsys.readouterr().out, "FD")) == pytest.approx(4, rel=0.1)
    assert len(read_evaluations(tmp_path / "a-evaluation.json")) == 1


# ---- fidelity with a baseline ----


def test_a_cached_run_and_its_baseline(tmp_path, capsys):
    run = write_run(tmp_path)
    cached = ("--cache", "taylor", "--interval", "2", "--order", "1", "--num-steps", "6", "--num-fid-samples", "12")
    main(["evaluate", "--ckpt", str(run), *cached, "--baseline", "full"])
    out = capsys.readouterr().out
    assert re.search(r"^PSNR +[\d.]+ dB, worst 5 %", out, re.MULTILINE)
    assert re.search(r"^Relative error of the state, mean of 12 images: ", out, re.MULTILINE)
    samples = run / "samples"
    (plot,) = samples.glob("*-step-errors.png")
    Image.open(plot).verify()
    (record,) = samples.glob("*taylor*-evaluation.json")
    _, fidelity = read_evaluations(record)
    assert len(fidelity["step_errors"]) == 6 and fidelity["fidelity"]["images"] == 12

    folders = sorted(path for path in samples.iterdir() if (path / "sample.json").is_file())
    main(["evaluate", "--samples", str(folders[1]), "--baseline", str(folders[0])])
    again = capsys.readouterr().out
    assert row(again, "SSIM") == row(out, "SSIM") and "Relative error" not in again


def test_the_recommended_cache_labels_of_a_file_and_full_steps_that_were_measured(tmp_path, capsys):
    run = write_run(tmp_path)
    (tmp_path / "labels.txt").write_text("3\n1\n4\n")
    labels = ("--labels", str(tmp_path / "labels.txt"))
    drawn = ("--ckpt", str(run), *labels, "--num-fid-samples", "9", "--num-steps", "12")
    for cache in (("--fast",), ("--cache", "taylor", "--order", "1", "--error-threshold", "0.5")):
        main(["evaluate", *drawn, *cache, "--baseline", "full"])
        assert "mean of 9 images" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (run / "samples").glob("*/sample.json")]
    assert {record["settings"]["labels"] for record in records} == {"3,1,4"}
    assert sorted(record["settings"]["cache"] != "none" for record in records) == [False, True, True]


def test_of_folders_that_hold_more_only_what_was_asked_for_is_measured(tmp_path, capsys):
    run = write_run(tmp_path)
    main(["sample", "--ckpt", str(run), "--num-steps", "2", "--labels", "balanced", "--num-fid-samples", "20"])
    cached = ("--cache", "reuse", "--interval", "2", "--num-steps", "2", "--num-fid-samples", "12")
    main(["evaluate", "--ckpt", str(run), *cached, "--baseline", "full"])
    assert "12 images" in capsys.readouterr().out
    main(["evaluate", "--ckpt", str(run), "--num-steps", "2", "--num-fid-samples", "12"])
    assert ": 12 samples against" in capsys.readouterr().out


def test_baselines_alone_need_neither_features_nor_a_reference(tmp_path, capsys):
    for name, shift in (("a", 0), ("b", 3)):
        write_image(tmp_path / name / "0.png", np.full((16, 16, 3), 100 + shift, np.uint8))
    main(["evaluate", "--samples", str(tmp_path / "a"), "--baseline", str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert row(out, "PSNR").startswith(f"{10 * np.log10(255**2 / 9):.2f} dB") and "FD" not in out


# ---- what cannot be done ----


@pytest.mark.parametrize("flags", [(), ("--run", "a", "--ckpt", "b"), ("--run", "a", "--samples", "b")])
def test_exactly_one_thing_is_judged(capsys, flags):
    assert "exactly one of --run, --ckpt and --samples must be given" in refusal(capsys, *flags)


def test_what_cannot_be_judged_is_refused(tmp_path, capsys):
    run = write_run(tmp_path)
    assert "--num-fid-samples must be above 64" in refusal(capsys, "--run", run, "--num-fid-samples", "64")
    assert not (run / "evaluation.jsonl").exists()
    assert "nowhere, which does not exist" in refusal(capsys, "--samples", tmp_path / "nowhere")
    assert "holds no checkpoints" in refusal(capsys, "--run", tmp_path)
    for index in range(70):
        write_image(tmp_path / "large" / f"{index}.png", np.zeros((16, 16, 3), np.uint8))
    assert "--features must be given" in refusal(capsys, "--samples", tmp_path / "large")
    assert "--reference must be given with --features dinov2-vit-b" in refusal(
        capsys, "--samples", tmp_path / "large", "--features", "dinov2-vit-b"
    )
    assert "must be uint8 (count, 8, 8, 3)" in refusal(capsys, "--samples", tmp_path / "large", "--features", "digits")


def test_what_was_drawn_before_is_opened_before_the_reference_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "load_reference", lambda *_: pytest.fail("the reference was read"))
    bad, good = tmp_path / "bad.npz", write_digits(tmp_path / "good", 1)
    bad.write_bytes(b"no archive")
    flags = ("--features", "digits", "--reference", good)
    for samples in (("--samples", bad), ("--samples", good, "--baseline", bad)):
        assert f"{bad} must be an .npz with images" in refusal(capsys, *samples, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", ".", "--baseline", "full"), "--baseline full must come with --ckpt and a cache"),
        (("--ckpt", "run", "--baseline", "full"), "--baseline full must come with --ckpt and a cache"),
        (("--run", "run", "--baseline", "full", "--cache", "taylor"), "--baseline must come with images"),
        (("--samples", ".", "--fast"), "--fast must come with --ckpt or --run, got --samples"),
        (("--samples", ".", "--num-steps", "25"), "--num-steps must come with --ckpt or --run, got --samples"),
        (("--samples", ".", "--baseline", "nowhere"), "--baseline must be a folder, an .npz, or full, got nowhere"),
        (("--samples", ".", "--features", "stored", "--baseline", "."), "got --features stored"),
        (("--ckpt", "run", "--features", "stored"), "--features stored must come with --samples"),
        (("--ckpt", "run", "--mode", "sde", "--heun"), "--heun must come with --mode ode, got --mode sde"),
        (("--ckpt", "run", "--classifier-dir", __file__), f"--classifier-dir must be a folder, got {__file__}"),
        (("--samples", ".", "--kid-subset-size", "1"), "--kid-subset-size must be an integer from 2 to"),
        (("--samples", ".", "--per-proc-batch-size", "0"), "--per-proc-batch-size must be an integer from 1 to"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(capsys, flags, message):
    assert message in refusal(capsys, *flags)
