"""python -m haste_ext.bench from its flags to JSON, tables and plots, on tiny shapes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

from haste_ext.bench import compare, plot
from haste_ext.bench.__main__ import build_parser, check_output, main
from haste_ext.bench.operations import OPERATIONS

ROOT = Path(__file__).parents[3]
TINY = ["--tokens", "9", "20", "--batch", "2", "--heads", "2", "--layers", "3", "--width", "48", "--feature-dim", "64"]
FAST = ["--min-seconds", "0.001", "--threads", str(torch.get_num_threads())]
CONTENDERS = {name: [contender.name for contender in op.contenders] for name, op in OPERATIONS.items()}


def small_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haste_ext.bench.measure.SECONDS", 0.001)
    monkeypatch.setattr("haste_ext.bench.measure.COPY_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr("haste_ext.bench.measure.MATMUL_SIZES", {"cpu": (32, 64)})


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function, **settings):
        raise RuntimeError("no C++\n compiler here")

    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
    small_roofline(monkeypatch)


@pytest.fixture
def no_compiler(monkeypatch):
    without_compiler(monkeypatch)


@pytest.fixture(scope="module")
def run_of_everything(tmp_path_factory) -> str:
    """The JSON of one run of all operations in two types, on a machine whose torch.compile fails."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_roofline(monkeypatch)
        without_compiler(monkeypatch)
        assert main([*TINY, *FAST, "--output", str(path)]) == 0
    return path.read_text()


@pytest.fixture
def document(run_of_everything, tmp_path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(run_of_everything)
    return path


def test_every_operation_ends_in_json(document):
    content = json.loads(document.read_text())
    assert {"date", "torch", "device", "processor", "threads", "cpu_capability", "commit"} <= content["machine"].keys()
    assert content["roofline"]["copy_bytes_per_second"] > 0
    assert content["roofline"]["matmul_flops_per_second"].keys() == {"float32", "bfloat16"}
    cases = [(r["operation"], r["case"]["dtype"], r["case"]["tokens"]) for r in content["results"]]
    assert cases == [(op, dtype, n) for op in OPERATIONS for dtype in ("float32", "bfloat16") for n in (9, 20)]
    for result in content["results"]:
        rows = {row["name"]: row for row in result["rows"]}
        copy = ["a copy of the same bytes"] if result["operation"] != "attn_align_loss" else []
        assert list(rows) == [*CONTENDERS[result["operation"]], *copy]
        assert rows.pop("torch.compile")["absent"] == "no C++ compiler here"
        for row in rows.values():
            seconds, work = row["seconds"], result["work"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert row["bytes_per_second"] == pytest.approx(work["bytes"] / seconds["median"])
            assert row["roofline_share"] == pytest.approx(work["floor_seconds"] / seconds["median"])
        ours = rows[result["ours"]]
        for results in ours["errors"].values():
            assert all(0 <= accuracy["error"] <= accuracy["allowed"] for accuracy in results.values())


def test_a_folder_gets_one_file_per_operation(no_compiler, tmp_path):
    command = [*TINY, *FAST, "--op", "taylor_extrapolate", "token_cosine_loss", "--dtype", "float32"]
    assert main([*command, "--output", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"taylor_extrapolate.json", "token_cosine_loss.json"}


def test_forward_only_leaves_the_gradients_out(no_compiler, tmp_path):
    path = tmp_path / "forward.json"
    assert main([*TINY, *FAST, "--op", "attn_align_loss", "--dtype", "float32", "--forward-only",
                 "--output", str(path)]) == 0  # fmt: skip
    for result in json.loads(path.read_text())["results"]:
        assert result["mode"] == "forward"
        assert {tuple(row["errors"]["random"]) for row in result["rows"] if "errors" in row} == {("loss",)}


def test_one_batch_for_each_number_of_tokens(no_compiler, tmp_path):
    path = tmp_path / "run.json"
    main([*FAST, "--op", "token_cosine_loss", "--dtype", "float32", "--tokens", "8", "16", "--batch", "4", "2",
          "--output", str(path)])  # fmt: skip
    cases = [result["case"] for result in json.loads(path.read_text())["results"]]
    assert [(case["tokens"], case["batch"]) for case in cases] == [(8, 4), (16, 2)]


def test_torch_compile_runs_where_it_can(tmp_path):
    path = tmp_path / "run.json"
    main([*FAST, "--op", "taylor_extrapolate", "--dtype", "float32", "--tokens", "8", "--batch", "1", "--width", "16",
          "--output", str(path)])  # fmt: skip
    row = json.loads(path.read_text())["results"][0]["rows"][2]
    assert row["name"] == "torch.compile"
    assert "seconds" in row or row["absent"]


def test_what_is_wrong_is_not_timed(no_compiler, monkeypatch, tmp_path, capsys):
    op = OPERATIONS["token_cosine_loss"]
    *others, ours = op.contenders
    wrong = replace(ours, function=lambda student, teacher: 1.01 * ours.function(student, teacher))
    monkeypatch.setitem(OPERATIONS, op.name, replace(op, contenders=(*others, wrong)))
    path = tmp_path / "run.json"
    assert main([*TINY, *FAST, "--op", op.name, "--dtype", "float32", "--output", str(path)]) == 1
    row = next(row for row in json.loads(path.read_text())["results"][0]["rows"] if row["name"] == "haste")
    assert "seconds" not in row and row["failed"]
    assert row["absent"].startswith("not timed: loss (random) is off by")
    assert row["absent"] in capsys.readouterr().out


def test_inputs_beyond_the_memory_are_said_to_be(no_compiler, capsys):
    assert main([*FAST, "--op", "taylor_extrapolate", "--dtype", "float32", "--width", str(2**36)]) == 1
    assert "the inputs cannot be made" in capsys.readouterr().out


def test_a_contender_beyond_the_memory_is_said_to_be(no_compiler, monkeypatch, capsys):
    op = OPERATIONS["taylor_extrapolate"]
    first, *others = op.contenders
    greedy = replace(first, function=lambda *inputs: torch.empty(2**42))
    monkeypatch.setitem(OPERATIONS, op.name, replace(op, contenders=(greedy, *others)))
    assert main([*TINY, *FAST, "--op", op.name, "--dtype", "float32"]) == 0
    assert "it wants more memory than there is" in capsys.readouterr().out


def test_tables_come_from_the_json_alone(document, capsys):
    content = json.loads(document.read_text())
    row = next(row for row in content["results"][0]["rows"] if row["name"] == "haste")
    row["seconds"]["median"] = 1.234567
    row["errors"]["random"]["dq"]["error"] = None
    document.write_text(json.dumps(content))
    assert main(["table", str(document)]) == 0
    text = capsys.readouterr().out
    assert "1234.567" in text and "not finite" in text
    for op, names in CONTENDERS.items():
        assert op in text and all(name in text for name in names)


def test_plots_come_from_the_json_alone(document, tmp_path):
    assert main(["plot", str(document), "--output", str(tmp_path / "images")]) == 0
    images = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in images] == sorted(f"run-{op}.png" for op in OPERATIONS)
    for path in images:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.02


def test_a_plot_shows_the_numbers_of_the_json(document):
    content = json.loads(document.read_text())
    results = [r for r in content["results"] if r["operation"] == "attn_align_loss"]
    figure = plot.plot_operation(results, content)
    time, memory, share = figure.axes[:3]
    for axes, key, factor in ((time, "seconds", 1e3), (share, "roofline_share", 1e2)):
        plotted = {line.get_label(): line for line in axes.lines}
        for name in CONTENDERS["attn_align_loss"]:
            rows = [row for r in results[:2] for row in r["rows"] if row["name"] == name]
            if "absent" in rows[0]:
                assert name not in plotted
                continue
            expected = [factor * (row[key]["median"] if key == "seconds" else row[key]) for row in rows]
            assert list(plotted[name].get_xdata()) == [9, 20]
            assert list(plotted[name].get_ydata()) == pytest.approx(expected)
    assert all(math.isfinite(y) and y > 0 for line in memory.lines for y in line.get_ydata())
    plot.plt.close(figure)


def test_a_plot_says_what_is_absent_and_why(document):
    content = json.loads(document.read_text())
    figure = plot.plot_operation(content["results"][:4], content)
    cases = "float32 N 9, float32 N 20, bfloat16 N 9, bfloat16 N 20"
    assert any(f"No torch.compile for {cases}: no C++ compiler here" in text.get_text() for text in figure.texts)
    plot.plt.close(figure)


def test_a_run_without_a_roofline_has_no_panel_for_it(document, tmp_path):
    content = json.loads(document.read_text())
    figure = plot.plot_operation(content["results"][:4], {**content, "roofline": None})
    assert len(figure.axes) == 4
    plot.plt.close(figure)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    (
        (["--tokens", "0"], "--tokens: must be a whole number of at least 1, got 0"),
        (["--batch", "2.5"], "--batch: must be a whole number of at least 1, got 2.5"),
        (["--min-seconds", "-1"], "--min-seconds: must be a positive number, got -1"),
        (["--op", "softmax"], "invalid choice: 'softmax'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--preset", "unet"], "invalid choice: 'unet'"),
        (["--tokens", "8", "16", "--batch", "1", "2", "3"], "--batch must be one number, or one for each"),
        (["--output", "run.txt"], "--output must end in .json or name a folder, got run.txt"),
        (["plot", "nowhere.json"], "got nowhere.json, which is no JSON"),
        (["table", __file__], "which is no JSON"),
        (["host", "--output", "host.txt"], "--output must end in .json, got host.txt"),
        (["host", "--output", "folder"], "--output must end in .json, got folder"),
        (["host", "--output", "/proc/below/host.json"], "got /proc/below/host.json, which cannot be written"),
        (["--output", "/proc/below/run.json"], "got /proc/below/run.json, which cannot be written"),
        (["--output", "/proc"], "got /proc, which cannot be written"),
    ),
)
def test_refusals(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr("haste_ext.bench.__main__.describe_machine", None)  # nothing is measured
    monkeypatch.setattr("haste_ext.bench.__main__.compare_on_host", None)
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device must be cpu, got cuda" in capsys.readouterr().err


def test_a_json_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[1, 2]")
    with pytest.raises(SystemExit):
        main(["plot", str(path)])
    assert f"{path}, which holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("command", ("table", "plot"))
@pytest.mark.parametrize("what", ("host", "rehearsal", "no results", "no rows"))
def test_results_of_another_kind_are_refused(what, command, document, tmp_path, capsys):
    content = json.loads(document.read_text())
    if what == "host":
        content["results"] = [compare.compare_on_host(OPERATIONS["token_cosine_loss"], "cpu", 0.001)]
    elif what == "rehearsal":
        content = json.loads(stand_in("benchmark"))
    elif what == "no results":
        content["results"] = []
    else:
        del content["results"][1]["rows"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        main([command, str(path)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert f"FILE.json must hold operations beside other ways of writing them, got {path}" in said.err


def stand_in(kind: str) -> str:
    """What a rehearsal of tools/gpu_check has in place of a benchmark's JSON."""
    code = "import stand_in, sys; print(stand_in.contents(sys.argv[1], ()))"
    return subprocess.check_output([sys.executable, "-c", code, kind], cwd=ROOT / "tools/gpu", text=True)


def test_what_is_kept_in_the_repository_can_be_shown(capsys):
    paths = [path for name in OPERATIONS for path in (ROOT / "benchmarks" / name).glob("*.json")]
    assert paths and main(["table", *map(str, paths)]) == 0


@pytest.mark.parametrize("kind", ("a folder", "a file as its folder"))
@pytest.mark.parametrize("flags", (["host"], []))
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    kind, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("haste_ext.bench.__main__.describe_machine", None)
    monkeypatch.setattr("haste_ext.bench.__main__.compare_on_host", None)
    path = tmp_path / "run.json"
    path.mkdir() if kind == "a folder" else path.write_text("mine")
    path = path if kind == "a folder" else path / "run.json"
    with pytest.raises(SystemExit):
        main([*flags, "--output", str(path)])
    assert f"got {path}, which cannot be written" in capsys.readouterr().err
    assert kind == "a folder" or path.parent.read_text() == "mine"


def test_an_output_that_can_be_written_stays_as_it_is_until_then(tmp_path):
    parser, path = build_parser(), tmp_path / "new" / "run.json"
    check_output(parser, path, "end in .json")
    assert list(path.parent.iterdir()) == []
    path.write_text('{"results": []}')
    check_output(parser, path, "end in .json")
    assert path.read_text() == '{"results": []}'


@pytest.mark.parametrize("content", ["mine", "[1]", "{}", "3"])
def test_an_output_that_holds_something_else_is_refused_and_stays(tmp_path, capsys, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        check_output(build_parser(), path, "end in .json")
    assert f"--output must be a new file or one of results, got {path}" in capsys.readouterr().err
    assert path.read_text() == content


def test_a_folder_of_images_that_is_a_file_is_refused(document, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        main(["plot", str(document), "--output", str(tmp_path / "file")])
    said = capsys.readouterr().err
    assert f"--output must be a folder that can be written to, got {tmp_path / 'file'} (File exists)" in said


def test_host_time_of_each_loss_beside_a_function_that_does_nothing(tmp_path, capsys):
    path = tmp_path / "host.json"
    assert main(["host", *FAST, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [result["operation"] for result in document["results"]] == ["attn_align_loss", "token_cosine_loss"]
    for result in document["results"]:
        trivial, ours = (result["seconds"][name]["median"] for name in ("trivial Function", "haste"))
        assert result["ratio"] == ours / trivial > 0
    printed = capsys.readouterr().out
    assert "token_cosine_loss, trivial" in printed and "times trivial" in printed


def test_host_time_needs_a_device_that_is_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        main(["host", "--device", "cuda"])
    assert "--device must be cpu, got cuda" in capsys.readouterr().err
