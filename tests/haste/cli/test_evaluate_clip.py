"""`haste evaluate --clip`: of samples, of a checkpoint and of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from haste import plotting
from haste.cli.main import main
from haste.evaluation.records import read_evaluations
from text_run import write_text_run

QUICK = ("--num-steps", "2", "--num-fid-samples", "6")


@pytest.fixture(autouse=True)
def no_grid(monkeypatch):
    """Of all samples, which takes longer to plot than these to sample."""
    monkeypatch.setattr(plotting, "plot_grid", lambda *args, **settings: None)


@pytest.fixture
def run(tmp_path) -> Path:
    return write_text_run(tmp_path / "exps", steps=(2, 4))


def scores(out: str) -> list[str]:
    return re.findall(r"CLIP score +([0-9.]+)$", out, re.MULTILINE)


def test_samples_their_npz_and_their_checkpoint_have_one_score(run, capsys):
    clip = ("--clip", str(run.parent / "clip"))
    main(["sample", "--ckpt", str(run), *QUICK])
    (folder,) = [path for path in (run / "samples").iterdir() if path.is_dir()]
    npz = folder.with_name(folder.name + ".npz")
    capsys.readouterr()
    for place in (("--samples", str(folder)), ("--samples", str(npz)), ("--ckpt", str(run), *QUICK)):
        main(["evaluate", *place, *clip])
    (first, *others) = scores(capsys.readouterr().out)
    assert len(others) == 2 and set(others) == {first}
    kept = read_evaluations(folder.with_name(folder.name + "-evaluation.json"))
    assert [list(each["metrics"]) for each in kept] == [["clip_score"]] * len(kept)
    assert f"{kept[0]['metrics']['clip_score']['value']:.3f}" == first
    assert kept[0]["settings"]["features"].startswith("clip-clip-") and kept[0]["settings"]["count"] == 6

    main(["evaluate", "--run", str(run), *QUICK, *clip])
    out = capsys.readouterr().out
    rows = re.findall(r"^(000000[24]) +([0-9.]+)$", out, re.MULTILINE)
    assert [step for step, _ in rows] == ["0000002", "0000004"] and rows[1][1] == first


def test_samples_without_captions_are_refused_before_the_model_is_loaded(run, tmp_path, capsys):
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    for flags in (("--clip", "nowhere"), ("--clip", str(run.parent / "clip"))):
        with pytest.raises(SystemExit):
            main(["evaluate", "--samples", str(tmp_path / "plain.npz"), *flags])
        assert "--samples must hold captions" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--samples", str(tmp_path / "plain.npz"), "--clip", "x", "--features", "stored"])
    assert "--clip must come with images" in capsys.readouterr().err
