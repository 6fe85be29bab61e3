"""The folder of a run and its branches."""

import json
import logging
import os

import pytest
from haste.errors import UserError
from haste.training import run_dir as module
from haste.training.run_dir import Branch, Branches, RunDir


def test_a_new_folder_holds_the_settings(make_config):
    config = make_config(seed=7)
    folder = RunDir(config)
    assert not folder.path.exists()  # a run that cannot start leaves nothing
    folder.create(0)
    assert json.loads((folder.path / "args.json").read_text())["seed"] == 7
    assert folder.checkpoints.is_dir()


def test_another_run_is_refused_and_left_as_it_was(make_config):
    folder = RunDir(make_config())
    folder.create(0)
    RunDir(make_config(seed=2))  # nothing has been trained: it is no run yet
    folder.log({"step": 1})
    before = (folder.path / "args.json").read_text()
    with pytest.raises(UserError, match=r"--exp-name .* a run with --seed 0, not 1; --attn-coeff"):
        RunDir(make_config(attn_coeff=0.0, seed=1))
    assert (folder.path / "args.json").read_text() == before


def test_the_same_run_may_get_a_later_end(make_config):
    RunDir(make_config()).create(0)
    folder = RunDir(make_config(max_train_steps=99))
    folder.create(0)
    assert json.loads((folder.path / "args.json").read_text())["max_train_steps"] == 99


def test_a_folder_that_cannot_be_made_is_reported(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunDir(make_config(output_dir=str(tmp_path / "file")))
    with pytest.raises(UserError, match="cannot be used"):
        folder.create(0)
    with pytest.raises(UserError, match="--output-dir must be a folder that can be written"), folder.hold():
        pass


def test_settings_that_cannot_be_read_are_reported(make_config):
    folder = RunDir(make_config())
    folder.create(0)
    folder.log({"step": 1})
    (folder.path / "args.json").write_text("{")
    with pytest.raises(UserError, match=r"args\.json must be the record of a run"):
        RunDir(make_config())


def test_log_lines_that_will_be_written_again_are_dropped(make_config):
    folder = RunDir(make_config())
    folder.create(0)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 0.5})
    with open(folder.path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    folder.truncate_log(2)
    lines = (folder.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_forgetting_needs_no_log(make_config):
    folder = RunDir(make_config())
    folder.truncate_log(0)
    assert not (folder.path / "log.jsonl").exists()


def make_run(folder):
    """What a run with checkpoints 4, 8 and 12 leaves, with samples and scores."""
    for step in (4, 8, 12):
        for name in (f"checkpoints/{step:07d}.pt", f"samples/{step:07d}.png", f"samples/{step:07d}-ode-50.npz",
                     f"samples/{step:07d}-ode-50/000000.png"):  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    (folder / "samples" / "mine-12.png").write_text("the user's own")
    (folder / "args.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 13)))
    (folder / "evaluation.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (4, 8, 12)))
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def check_branch(run, everything):
    aside = run / "branches" / "1-from-0000004"
    assert Branches(run).running == Branch(4, "branches/1-from-0000004", True)
    later = [name for name in everything if "/" in name and "mine" not in name and "0000004" not in name]
    logs = ["args.json", "evaluation.jsonl", "log.jsonl"]
    assert files(aside) == sorted([*later, *logs])
    here = [name for name in files(run) if not name.startswith("branches/")]
    assert here == sorted([*(set(everything) - set(later)), "branch.json"])
    assert steps(aside / "log.jsonl") == list(range(1, 13)) and steps(run / "log.jsonl") == [1, 2, 3, 4]
    assert steps(aside / "evaluation.jsonl") == [4, 8, 12] and steps(run / "evaluation.jsonl") == [4]


def test_the_later_steps_of_the_old_branch_move_aside(tmp_path, caplog):
    everything = files(make_run(tmp_path))
    with caplog.at_level(logging.INFO):
        Branches(tmp_path).begin(4)
    assert "--resume-step 4 begins a branch; later steps move to " in caplog.text
    check_branch(tmp_path, everything)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(1, 14))
def test_a_move_that_was_killed_is_finished(tmp_path, monkeypatch, after):
    everything = files(make_run(tmp_path))
    done = []

    def step(original):
        def counted(*args):
            if len(done) == after:
                raise Killed
            done.append(1)
            return original(*args)

        return counted

    for name in ("move", "write_text", "write_json"):
        monkeypatch.setattr(module, name, step(getattr(module, name)))
    with pytest.raises(Killed):
        Branches(tmp_path).begin(4)
    monkeypatch.undo()
    Branches(tmp_path).settle()
    check_branch(tmp_path, everything)


def test_the_same_step_again_goes_on_with_the_branch_and_another_begins_one(tmp_path):
    make_run(tmp_path)
    branches = Branches(tmp_path)
    assert branches.step_to_read(4) == 4 and branches.step_to_read(0) == 0
    branches.begin(4)
    (tmp_path / "checkpoints" / "0000008.pt").write_text("new")
    assert branches.step_to_read(4) == 0
    branches.begin(4)
    branches.begin(0)
    assert (tmp_path / "checkpoints" / "0000008.pt").read_text() == "new"
    (tmp_path / "checkpoints" / "0000012.pt").write_text("new")
    assert branches.step_to_read(8) == 8
    branches.begin(8)
    assert branches.running == Branch(8, "branches/2-from-0000008", True)
    assert (tmp_path / branches.running.aside / "checkpoints" / "0000012.pt").read_text() == "new"


def test_from_the_newest_step_nothing_moves_and_the_same_command_goes_on(tmp_path):
    make_run(tmp_path)
    before = files(tmp_path)
    Branches(tmp_path).begin(12)
    assert files(tmp_path) == sorted([*before, "branch.json"])
    assert Branches(tmp_path).step_to_read(12) == 0


def test_another_disk_gets_a_copy_before_anything_is_deleted(tmp_path, monkeypatch):
    everything = files(make_run(tmp_path))
    rename = os.rename

    def across(source, target):
        if ".tmp" not in str(source):
            raise OSError(module.errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", across)
    Branches(tmp_path).begin(4)
    check_branch(tmp_path, everything)


def test_a_record_that_is_none_is_named(tmp_path):
    (tmp_path / "branch.json").write_text('{"resumed_from": "x"}')
    with pytest.raises(UserError, match="resumed_from of .*branch.json must be an integer"):
        Branches(tmp_path).step_to_read(4)
