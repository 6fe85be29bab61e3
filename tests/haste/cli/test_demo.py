from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from haste import digits
from haste.cli import demo
from haste.cli.main import main, read_flags
from haste.digits import ClassifierConfig
from haste.errors import UserError
from haste.evaluation.config import EvaluateConfig
from haste.training.config import resolve

FLAGS = (
    "--max-train-steps", "10", "--num-steps", "8", "--interval", "3", "--order", "1", "--num-images", "16",
    "--num-fid-samples", "70",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick_classifier_and_teacher(monkeypatch):
    settings = digits.TeacherConfig
    monkeypatch.setattr(digits, "TeacherConfig", lambda: settings(steps=3))
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_it_ends_in_a_page_and_a_second_run_does_nothing_again(tmp_path, capsys):
    folder = tmp_path / "demo"
    main(["demo", "--output-dir", str(folder), *FLAGS])
    out = capsys.readouterr().out
    page = folder / "index.html"
    assert out.splitlines()[-1] == str(page.resolve())
    html = page.read_text()
    assert html.count("data:image/png;base64,") > 16 + 3 * 14  # samples, full and forecast and different, and figures
    for words in ("HASTE beside the baseline", "without alignment", "no alignment", "The recorded benchmark"):
        assert words in html
    assert "http" not in html and str(folder) in html
    assert "3 of 8" in html and "8 of 8" in html  # full calls with a cache and without
    for run in ("digits", "baseline"):
        assert len(list((folder / run / "checkpoints").glob("*.pt"))) == 5

    patterns = ("*.pt", 6 * "[0-9]" + ".png", "sample.json", "config.json", "demo.json")
    work = {pattern: times(folder, pattern) for pattern in patterns}
    assert all(work.values())
    main(["demo", "--output-dir", str(folder), *FLAGS])
    assert {pattern: times(folder, pattern) for pattern in work} == work
    assert capsys.readouterr().out.splitlines()[-8:] == out.splitlines()[-8:]  # the seconds are those of the work


def test_the_commands_it_prints_do_what_it_does(tmp_path):
    args = demo.DemoConfig(
        output_dir=tmp_path / "a folder", max_train_steps=50, seed=3, num_steps=20, interval=5, order=1
    )
    config, baseline = demo.train_config(args), demo.baseline_config(args)
    expected = [
        config,
        baseline,
        demo.sample_config(args, config),
        demo.sample_config(args, config, cached=True),
        demo.evaluate_config(args, config),
        demo.evaluate_config(args, baseline),
    ]
    for wanted in expected:
        haste, command, *arguments = shlex.split(demo.command_line(wanted))
        assert haste == "haste"
        assert read_flags(command, arguments) == wanted


def test_the_baseline_is_the_run_without_alignment():
    config, baseline = demo.train_config(demo.DemoConfig(seed=3)), demo.baseline_config(demo.DemoConfig(seed=3))
    changed = {name for name, value in vars(config).items() if value != getattr(baseline, name)}
    assert changed == {"exp_name", "attn_coeff", "proj_coeff"} and config.teachers and not baseline.teachers


@pytest.mark.parametrize("content", ["[]", '{"haste train": 3}', '{"haste train": {"seconds": "x"}}', "{"])
def test_seconds_that_are_none_are_told(tmp_path, content):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(UserError, match=r"demo\.json"):
        demo.StageClock(tmp_path / "demo.json")


def test_a_shorter_demo_is_shorter_in_all_its_parts():
    preset = demo.TrainConfig.from_preset("digits")
    config = demo.train_config(demo.DemoConfig(max_train_steps=preset.max_train_steps // 2))
    assert config.early_stop_point == preset.early_stop_point // 2
    assert config.max_train_steps == 5 * config.checkpointing_steps
    usual = demo.train_config(demo.DemoConfig())
    assert usual == demo.replace(preset, output_dir="demo")


def test_a_demo_that_was_stopped_adds_up_its_seconds(tmp_path):
    settings = EvaluateConfig()
    first = demo.StageClock(tmp_path / "demo.json")
    with pytest.raises(KeyboardInterrupt), first.stage("evaluate", settings):
        raise KeyboardInterrupt
    interrupted = first.seconds()["evaluate"]

    second = demo.StageClock(tmp_path / "demo.json")
    with second.stage("evaluate", settings):
        pass
    assert second.seconds()["evaluate"] > interrupted > 0

    third = demo.StageClock(tmp_path / "demo.json")
    with third.stage("evaluate", settings):
        pass
    assert third.seconds() == second.seconds()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max-train-steps", "4"), "--max-train-steps must be at least 5, got 4"),
        (("--num-fid-samples", "64"), "--num-fid-samples must be at least 65, .* got 64"),
        (("--num-steps", "2"), "--interval must be at most the number of steps, 2, got 6"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_at_once(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--output-dir", str(tmp_path / "demo"), *flags])
    assert exit_.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "demo").exists()


def test_the_fewest_samples_are_one_more_than_the_classifiers_features():
    assert ClassifierConfig().features + 1 == demo.FEWEST_EVALUATED


def test_another_demo_in_the_same_folder_is_refused_by_the_flags_of_the_demo(tmp_path):
    first = demo.DemoConfig(output_dir=tmp_path, max_train_steps=20)
    run = tmp_path / "digits"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (run / "args.json").write_text(json.dumps(asdict(resolve(demo.train_config(first), 10))))
    first.check_folder()
    second = demo.DemoConfig(output_dir=tmp_path, max_train_steps=30)
    with pytest.raises(UserError, match="--output-dir must be another folder, .*: --max-train-steps 20, now 30$"):
        second.check_folder()
