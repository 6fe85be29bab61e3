from __future__ import annotations

import json
import re

import pytest
from haste.cli.main import main
from report_runs import digits_record, write_log


def write_quality(run, distances, **changes):
    lines = [json.dumps(digits_record(step, fd=distance, **changes)) for step, distance in distances.items()]
    (run / "evaluation.jsonl").write_text("\n".join(lines) + "\n")


def text_of(html):
    return re.sub(r"(\|\s*)+", "|", re.sub(r"<[^>]*>", "|", html))


def test_one_run_on_one_page_that_fetches_nothing(tmp_path, capsys):
    run = write_log(tmp_path, "haste", stop=16, seed=7)
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    html = (run / "report.html").read_text()
    assert "aligned with digits-vit until step 16" in html
    assert html.count("data:image/png;base64,") == 2 * 4 + 4  # curves for both themes, four grids of samples
    assert not re.search(r'(src|href)="(?!data:)', html)
    text = text_of(html)
    assert "|haste|" in text and "|100.0|" in text and "|150.0|" in text and "|0.250|" in text
    assert "Samples of haste at step 40" in html and "--seed" in text
    assert f"Nothing was measured yet; haste evaluate --run {run} would do it." in text


def test_several_runs_side_by_side(tmp_path, capsys):
    runs = [write_log(tmp_path, "haste", stop=16), write_log(tmp_path, "repa", stop=None, attn_coeff=0.0)]
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    html = page.read_text()
    assert "haste: SiT-Digits/2 on digits, 40 steps, aligned with digits-vit until step 16." in html
    assert "repa: SiT-Digits/2 on digits, 40 steps, aligned throughout with digits-vit." in html
    row = re.search(r"<tr><td[^>]*>--attn-coeff</td><td[^>]*>0.5</td><td[^>]*>0.0</td></tr>", html)
    assert row is not None
    text = text_of(html)
    assert "All curves are running means over a tenth of the curve" in text
    assert "|Velocity loss, difference|" in text and "|Feature loss, difference|" in text


def test_quality_is_shown_for_every_checkpoint_and_every_run(tmp_path, without_figures):
    runs = [write_log(tmp_path, "plain", stop=0), write_log(tmp_path, "haste", stop=16)]
    write_quality(runs[0], {20: 9.0, 40: 6.0})
    write_quality(runs[1], {20: 8.0, 40: 5.0})
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    text = text_of(page.read_text())
    assert "700 samples, 25 steps; classifier of the digits against the real digits." in text
    assert "|Step|FD, plain|FD, haste|Read as requested, %, plain|" in text
    assert "|20|9.000|8.000|90.0|90.0|" in text and "|40|6.000|5.000|90.0|90.0|" in text


def test_what_was_measured_otherwise_is_not_mixed(tmp_path, without_figures):
    runs = [write_log(tmp_path, "plain", stop=0), write_log(tmp_path, "haste", stop=16)]
    write_quality(runs[0], {20: 9.0})
    write_quality(runs[1], {20: 8.0}, cfg_scale=2.0)
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    text = text_of(page.read_text())
    assert "25 steps; classifier" in text and "25 steps, cfg_scale 2.0; classifier" in text
    assert "|20|9.000|90.0|" in text and "|20|8.000|90.0|" in text


def test_samples_stand_below_each_other_by_step(tmp_path, without_figures):
    runs = [write_log(tmp_path, name, stop=None) for name in ("a", "b")]
    (runs[0] / "samples" / "0000010.png").unlink()
    (runs[1] / "samples" / "0000035.png").write_bytes((runs[1] / "samples" / "0000030.png").read_bytes())
    (runs[1] / "samples" / "0000040.png").write_bytes(b"no image")
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    html = page.read_text()
    assert "|Step 20|Step 30|Step 40|a|b|no whole PNG file|" in text_of(html)
    shown = re.findall(r"Samples of (.) at step (\d+)", html)
    assert shown == [("a", "20"), ("a", "30"), ("a", "40"), ("b", "20"), ("b", "30")]


def test_a_run_without_a_teacher_had_no_alignment_that_could_end(tmp_path, without_figures):
    for stop, sentence in ((0, "no alignment"), (None, "not by step 40"), (16, "16")):
        run = write_log(tmp_path, f"run{stop}", stop=stop)
        main(["report", str(run)])
        text = text_of((run / "report.html").read_text())
        assert "never" not in text
        row = text[text.index("|Steps left out|") :].split("|")
        assert row[2:6] == [f"run{stop}", "40", "0.0260", sentence]


def test_names_of_runs_are_text_and_nothing_else(tmp_path, without_figures):
    run = write_log(tmp_path, "a $\\frac{$ <b>&", stop=None)
    main(["report", str(run), str(run), "--output", str(tmp_path / "page.html")])
    html = (tmp_path / "page.html").read_text()
    assert "a $\\frac{$ &lt;b&gt;&amp;" in html and "<b>&" not in html


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "holds no log.jsonl with a line in it; it must be the folder of a run"),
        ("bare", "args.json must be the settings of a run"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, name, sentence):
    bare = write_log(tmp_path, "bare", stop=None)
    (bare / "args.json").unlink()
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and sentence in error and error.count("\n") == 1


def test_the_page_replaces_no_other_file(tmp_path, capsys):
    write_log(tmp_path, "run", stop=16)
    for name in ("log.jsonl", "args.json"):
        path = tmp_path / "run" / name
        before = path.read_bytes()
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path / "run"), "--output", str(path)])
        assert f"--output is {path}, which is there and no page of haste report" in capsys.readouterr().err
        assert path.read_bytes() == before
    for _ in range(2):  # its own it replaces
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
