from __future__ import annotations

import json
import re

import pytest
from digits_run import write_run
from haste.cli.main import main
from haste.evaluation import scores
from haste.evaluation.judge import JudgeSettings
from PIL import Image

QUICK = ("--num-steps", "2", "--num-fid-samples", "70")


@pytest.fixture(autouse=True)
def quick_judge(monkeypatch):
    monkeypatch.setattr(scores, "JudgeSettings", lambda: JudgeSettings(epochs=1))


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *arguments])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("haste evaluate:")]
    assert len(errors) == 1
    return errors[0]


def test_every_checkpoint_of_a_run(tmp_path, capsys):
    run = write_run(tmp_path)
    main(["evaluate", "--run", str(run), *QUICK])
    out = capsys.readouterr().out
    records = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert re.search(
            rf"^ *{record['step']} +{record['distance']:.3f} +{record['accuracy']:.1%}$", out, re.MULTILINE
        )
        assert record["samples"] == 70 and record["num_steps"] == 2
    assert "70 samples in 64 feature dimensions and is biased upwards" in out
    for picture in ("evaluation.png", "losses.png"):
        Image.open(run / picture).verify()
    assert len(list((tmp_path / "judge").iterdir())) == 1  # beside the runs

    main(["evaluate", "--run", str(run), *QUICK])
    assert capsys.readouterr().out == out
    assert len((run / "evaluation.jsonl").read_text().splitlines()) == 2


def test_one_checkpoint_and_its_samples_get_the_same_score(tmp_path, capsys):
    run = write_run(tmp_path)
    checkpoint = run / "checkpoints" / "0000002.pt"
    main(["evaluate", "--ckpt", str(checkpoint), *QUICK])
    (row,) = re.findall(r"^ *2 +([\d.]+) +([\d.]+%)$", capsys.readouterr().out, re.MULTILINE)
    assert not (run / "evaluation.png").exists()

    main(["sample", "--ckpt", str(checkpoint), *QUICK, "--labels", "balanced"])
    folder = run / "samples" / "0000002-euler-2-cfg1-seed0"
    capsys.readouterr()
    for samples in (folder, folder.with_name(folder.name + ".npz")):
        main(["evaluate", "--samples", str(samples), "--judge-dir", str(tmp_path / "judge")])
        (judged,) = re.findall(r"^ *\S*euler\S* +([\d.]+) +([\d.]+%)$", capsys.readouterr().out, re.MULTILINE)
        assert float(judged[0]) == pytest.approx(float(row[0]), rel=0.01)  # drawn in other batches: a grey level
        assert judged[1] == row[1]


def test_pictures_without_labels_have_a_distance_alone(tmp_path, capsys):
    run = write_run(tmp_path)
    main(["sample", "--ckpt", str(run), *QUICK])
    folder = run / "samples" / "0000004-euler-2-cfg1-seed0"
    (folder / "sample.json").unlink()
    capsys.readouterr()
    main(["evaluate", "--samples", str(folder)])
    assert re.search(r"euler\S* +[\d.]+ +unknown$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("flags", [(), ("--run", "a", "--ckpt", "b"), ("--run", "a", "--samples", "b")])
def test_exactly_one_thing_is_judged(capsys, flags):
    assert "it must be exactly one of --run, --ckpt and --samples" in refusal(capsys, *flags)


def test_what_cannot_be_judged_is_refused(tmp_path, capsys):
    run = write_run(tmp_path)
    assert "64 samples are too few" in refusal(capsys, "--run", str(run), "--num-fid-samples", "64")
    assert not (run / "evaluation.jsonl").exists()
    assert "nowhere, which does not exist" in refusal(capsys, "--samples", str(tmp_path / "nowhere"))
    assert "holds no checkpoints" in refusal(capsys, "--run", str(tmp_path))
    (tmp_path / "large").mkdir()
    for index in range(70):
        Image.new("RGB", (16, 16)).save(tmp_path / "large" / f"{index}.png")
    assert "reads uint8 pictures of shape (count, 8, 8, 3)" in refusal(capsys, "--samples", str(tmp_path / "large"))
