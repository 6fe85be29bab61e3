from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from haste.cli.main import main
from haste.evaluation.images import write_picture
from haste.training.recipes import recipe_config


def write_log(folder, name, stop, steps=40, **settings):
    """A run's folder as the trainer leaves it, without the training."""
    run = folder / name
    run.mkdir()
    config = {**asdict(recipe_config("digits")), "exp_name": name, **settings}
    (run / "args.json").write_text(json.dumps(config))
    with open(run / "log.jsonl", "w") as file:
        for step in range(1, steps + 1):
            aligned = stop is None or step <= stop
            line = {
                "step": step, "total_loss": 1.0, "loss": 1 / step, "proj_loss": -0.5 if aligned else None,
                "attn_loss": None, "grad_norm": 2.0, "skipped_steps": int(step == 3), "aligned": aligned,
                "images_per_second": 100.0 if aligned else 150.0, "teraflops": 0.25, "mfu": None,
                "peak_memory_gib": 1.5,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    for step in (10, 20, 30, 40):
        write_picture(run / "previews" / f"{step:07d}.png", np.full((8, 8, 3), step, np.uint8))
    return run


def test_one_run_on_one_page_that_fetches_nothing(tmp_path, capsys):
    run = write_log(tmp_path, "haste", stop=16, seed=7)
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    html = (run / "report.html").read_text()
    assert "taught by digits-vit until step 16" in html
    assert html.count("data:image/png;base64,") == 2 + 3  # curves for both themes, three previews
    assert not re.search(r'(src|href)="(?!data:)', html)
    text = re.sub(r"<[^>]*>", "|", html)
    assert "|haste|" in text and "|100.0|" in text and "|150.0|" in text and "|0.250|" in text
    assert "haste, step 40" in text and "--seed" in text


def test_several_runs_side_by_side(tmp_path, capsys):
    runs = [write_log(tmp_path, "haste", stop=16), write_log(tmp_path, "repa", stop=None, attn_coeff=0.0)]
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    html = page.read_text()
    assert "haste: SiT-Digits/2 on digits, 40 steps, taught by digits-vit until step 16." in html
    assert "repa: SiT-Digits/2 on digits, 40 steps, taught throughout by digits-vit." in html
    row = re.search(r"<tr><td[^>]*>--attn-coeff</td><td[^>]*>0.5</td><td[^>]*>0.0</td></tr>", html)
    assert row is not None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("none", "holds no log.jsonl with a line in it; it must be the folder of a run"), ("bare", "holds no settings")],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, name, sentence):
    bare = write_log(tmp_path, "bare", stop=None)
    (bare / "args.json").unlink()
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and sentence in error and error.count("\n") == 1
