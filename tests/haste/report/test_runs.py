from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from haste.cli.main import main
from haste.data.images import write_image
from haste.errors import UserError
from haste.report.runs import (
    Quality,
    digits_quality,
    evaluated_by,
    evaluation_panels,
    measurement,
    read_image,
    read_run,
    samples_quality,
    sampling_text,
    shown,
    write_report,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import digits_record, write_log

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def as_bytes(values):
    """JSON of values, or any bytes."""
    return st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode())


def lines(values):
    """A .jsonl file of values, or any bytes."""
    parts = st.lists(values.map(json.dumps) | st.just("{"), max_size=4)
    return st.binary(max_size=40) | parts.map(lambda each: "\n".join(each).encode())


def changed(whole, *names):
    """A dictionary, some of whose values are others."""
    return st.dictionaries(st.sampled_from(names), JSON | st.just(1), max_size=4).map(lambda some: {**whole, **some})


SAMPLES = {"samples": "0000002-euler", "count": 9}
ENTRY = st.fixed_dictionaries({}, optional={
    "settings": JSON | changed(SAMPLES, *SAMPLES),
    "metrics": JSON | st.dictionaries(st.just("recall"), JSON | st.just({"value": 0.5}), max_size=1),
})  # fmt: skip
LINE = changed({"step": 1}, "step", "aligned", "loss", "velocity_loss", "images_per_second", "skipped_steps")
FILES = {
    "log.jsonl": lines(LINE),
    "args.json": as_bytes(JSON | changed({}, "model", "data_dir", "enc_type", "seed")),
    "evaluation.jsonl": lines(changed(digits_record(2), "step", "samples", "num_steps", "fd", "checkpoint")),
    "samples/0000002-euler-evaluation.json": as_bytes(st.lists(ENTRY | JSON, max_size=2).map(
        lambda entries: {"evaluations": entries})),
    "samples/0000002.png": st.binary(max_size=60),
    "samples/missing.txt": st.binary(max_size=40),
}  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.fixed_dictionaries({}, optional=FILES))
def test_whatever_lies_in_a_run_there_is_a_page_or_a_sentence(tmp_path_factory, without_figures, files):
    run = write_log(tmp_path_factory.mktemp("runs"), "run", stop=None, steps=4)
    for name, content in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
    try:
        write_report([read_run(run)], run / "report.html")
    except UserError as error:
        assert str(run) in str(error)
    else:
        assert (run / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_damage_is_left_out_and_told(tmp_path):
    run = write_log(tmp_path, "run", stop=None, steps=4)
    with open(run / "log.jsonl", "a") as file:
        file.write("not a line\n")
    (run / "evaluation.jsonl").write_text("{}\n" + json.dumps(digits_record(2)) + "\n")
    read = read_run(run)
    assert read.steps == 4 and [quality.step for quality in read.quality] == [2]
    assert [remark.split(" cannot be read")[0] for remark in read.remarks] == [
        "run: 1 lines of log.jsonl", "run: 1 records of evaluations"]  # fmt: skip


def test_why_there_are_no_samples_is_told(tmp_path):
    run = write_log(tmp_path, "run", stop=None, steps=4)
    for path in (run / "samples").iterdir():
        path.unlink()
    assert read_run(run).remarks == ["run has no samples: it trained without --sampling-steps, or has not come to "
                                     "the first one."]  # fmt: skip
    (run / "samples" / "missing.txt").write_text("the VAE x cannot be loaded\n")
    assert read_run(run).remarks == ["run has no samples: the VAE x cannot be loaded."]


def test_measurements_compare_if_all_but_the_checkpoint_is_alike():
    first, second = digits_quality(digits_record(200)), digits_quality(digits_record(400))
    assert first.values == {"fd": 3.0, "label_accuracy": 0.9} and first.step == 200
    assert first.how == second.how != digits_quality(digits_record(400, cfg_scale=2.0)).how
    assert sampling_text(digits_record(1, cfg_scale=2.0, cache="taylor")) == "25 steps, cfg_scale 2.0, cache taylor"
    assert digits_quality({**digits_record(1), "step": None}).values == {}  # of a file that was renamed


def test_what_was_read_of_prompts_is_shown(tmp_path):
    run = write_log(tmp_path, "run", stop=None)
    rates = {"seen_digit": 0.9, "seen_all": 0.75, "held_out_all": None}
    records = [digits_record(step, label_accuracy=None, read=rates) for step in (20, 40)]
    (run / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (quality, _) = (read := read_run(run)).quality
    assert quality.values == {"fd": 3.0, "seen_all": 0.75}
    table = measurement([read], quality.how)
    assert table["header"] == ["Step", "FD", "Read as asked for, %"] and table["rows"][1] == ["40", "3.000", "75.0"]


def test_metrics_of_other_data_are_read_by_the_samples_they_are_of():
    entry = {
        "settings": {"samples": "0000200-euler-25-cfg1", "network": "Inception", "reference": "cats", "count": 50},
        "metrics": {"fd": {"value": 4.5}, "recall": {"value": None, "note": "too few"}, "odd": 3},
    }
    how = "50 samples (euler-25-cfg1); features of Inception against cats"
    assert samples_quality(entry) == Quality(how, 200, {"fd": 4.5})


def test_a_large_image_is_made_smaller_and_what_is_no_png_refused(tmp_path):
    import numpy as np

    write_image(tmp_path / "large.png", np.zeros((1000, 1000, 3), np.uint8))
    assert read_image(tmp_path / "large.png").shape == (520, 520, 3)
    data = (tmp_path / "large.png").read_bytes()
    for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", data[: len(data) // 2]):
        (tmp_path / "odd.png").write_bytes(content)
        with pytest.raises(UserError, match="is no whole PNG"):
            read_image(tmp_path / "odd.png")


def test_text_is_made_fit_to_be_shown():
    assert shown("a\ud800\x00b") == "a?\N{REPLACEMENT CHARACTER}b"
    assert len(shown("x" * 1000)) == 200 and shown(Path("a")) == "a"


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
    assert "|Diffusion loss, difference|" in text and "|Feature loss, difference|" in text


def test_quality_is_shown_for_every_checkpoint_and_every_run(tmp_path, without_figures):
    runs = [write_log(tmp_path, "plain", stop=0), write_log(tmp_path, "haste", stop=16)]
    write_quality(runs[0], {20: 9.0, 40: 6.0})
    write_quality(runs[1], {20: 8.0, 40: 5.0})
    page = tmp_path / "both.html"
    main(["report", *map(str, runs), "--output", str(page)])
    text = text_of(page.read_text())
    assert "700 samples, 25 steps; classifier of the digits against the real digits." in text
    assert "|Step|FD, plain|FD, haste|Label accuracy, %, plain|" in text
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
    main(["report", str(run), "--output", str(tmp_path / "page.html")])
    html = (tmp_path / "page.html").read_text()
    assert "a $\\frac{$ &lt;b&gt;&amp;" in html and "<b>&" not in html


def test_a_run_is_not_compared_with_itself(tmp_path, capsys):
    run = write_log(tmp_path, "one", stop=None)
    with pytest.raises(SystemExit) as left:
        main(["report", str(run), f"{run}/../one", "--output", str(tmp_path / "page.html")])
    assert left.value.code == 2 and "RUNS must be different folders, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "RUNS must be the folder of a run, got "),
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
        assert f"--output must be a new file, or a page of haste report, got {path}" in capsys.readouterr().err
        assert path.read_bytes() == before
    for _ in range(2):  # its own it replaces
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])


def test_scores_while_training_are_curves_apart_for_each_way_of_scoring(tmp_path):
    runs = []
    for name, count in (("a", 500), ("b", 500), ("c", 1000)):
        folder = write_log(tmp_path, name, None, evaluation_samples=count)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for line in lines[19::20]:
            line.update(fd=40.0 / line["step"], label_accuracy=0.5)
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(read_run(folder))
    panels = {panel.title: panel for panel in evaluation_panels(runs)}
    assert list(panels) == [
        "FD (500 samples while training)", "Label accuracy, % (500 samples while training)",
        "FD (1000 samples while training)", "Label accuracy, % (1000 samples while training)",
    ]  # fmt: skip
    first, second = panels["FD (500 samples while training)"].curves
    assert (first.run, second.run) == (0, 1)
    assert first.steps.tolist() == [20, 40] and first.values.tolist() == [2.0, 1.0]
    assert panels["Label accuracy, % (1000 samples while training)"].curves[0].values.tolist() == [50.0, 50.0]
    other = read_run(write_log(tmp_path, "d", None, evaluation_features="dinov2-vit-l", evaluation_reference="real"))
    assert evaluated_by(other) == "1000 samples in dinov2-vit-l against real"


def test_the_mean_relative_to_a_baseline_is_a_metric_of_the_page():
    settings = {"samples": "0000040-ode50", "count": 50, "network": "a and b", "reference": "real",
                "relative_to": "held_out"}  # fmt: skip
    found = samples_quality({"settings": settings, "metrics": {"fdr": {"value": 1.5}}})
    assert found.step == 40 and found.values == {"fdr": 1.5}
    assert "features of a and b against real, relative to held_out" in found.how
