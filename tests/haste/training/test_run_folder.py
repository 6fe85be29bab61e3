import json

import pytest
from haste.errors import UserError
from haste.training.run_dir import RunDir


def test_a_new_folder_holds_the_settings(make_config):
    config = make_config(seed=7)
    folder = RunDir(config)
    assert not folder.path.exists()  # a run that cannot start leaves nothing
    folder.claim(0)
    assert json.loads((folder.path / "args.json").read_text())["seed"] == 7
    assert folder.checkpoints.is_dir()


def test_another_run_is_refused_and_left_as_it_was(make_config):
    folder = RunDir(make_config())
    folder.claim(0)
    before = (folder.path / "args.json").read_text()
    with pytest.raises(UserError, match=r"holds a run with other settings: --attn-coeff \(0.5, now 0.0\), --seed"):
        RunDir(make_config(attn_coeff=0.0, seed=1))
    assert (folder.path / "args.json").read_text() == before


def test_the_same_run_may_get_a_later_end(make_config):
    RunDir(make_config()).claim(0)
    folder = RunDir(make_config(max_train_steps=99))
    folder.claim(0)
    assert json.loads((folder.path / "args.json").read_text())["max_train_steps"] == 99


def test_a_folder_that_cannot_be_made_is_reported(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        RunDir(make_config(output_dir=str(tmp_path / "file"))).claim(0)


def test_settings_that_cannot_be_read_are_reported(make_config):
    folder = RunDir(make_config())
    folder.claim(0)
    (folder.path / "args.json").write_text("{")
    with pytest.raises(UserError, match=r"args\.json must be the settings of a run"):
        RunDir(make_config())


def test_log_lines_that_will_be_written_again_are_dropped(make_config):
    folder = RunDir(make_config())
    folder.claim(0)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 0.5})
    with open(folder.path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    folder.forget_after(2)
    lines = (folder.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_forgetting_needs_no_log(make_config):
    folder = RunDir(make_config())
    folder.forget_after(0)
    assert not (folder.path / "log.jsonl").exists()
