from __future__ import annotations

import json
from pathlib import Path

import pytest
from haste.data.images import write_image
from haste.errors import UserError
from haste.report.reading import Quality, digits_quality, read_image, read_run, samples_quality, sampling_text, shown
from haste.report.runs import write_report
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
