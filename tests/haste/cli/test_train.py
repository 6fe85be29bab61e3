from __future__ import annotations

import ast
import inspect
import itertools
import json
import subprocess
import sys

import pytest
from haste.cli import main as main_module
from haste.cli.main import main
from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.settings import command_config


def run_expecting_exit(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr()
    return exit_.value.code, output.out, output.err


def test_help_lists_the_commands(capsys):
    code, out, _ = run_expecting_exit(capsys, "--help")
    assert code == 0
    for command in ("train", "sample", "evaluate", "demo"):
        assert f"\n  {command} " in out


def test_every_setting_is_explained():
    """tyro shows the string below a field as the help of its flag."""
    (config,) = [node for node in ast.parse(inspect.getsource(TrainConfig)).body if isinstance(node, ast.ClassDef)]
    unexplained = [
        before.target.id
        for before, after in itertools.pairwise(config.body)
        if isinstance(before, ast.AnnAssign) and not isinstance(after, ast.Expr)
    ]
    assert unexplained == []


def test_help_and_startup_bring_no_torch():
    code = (
        "import sys\n"
        "from haste.cli.main import main\n"
        "try: main(['train', '--preset', 'digits', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--attn-coeff" in result.stdout and "Weight of the attention alignment" in result.stdout


def test_a_preset_sets_defaults_and_flags_override_it(monkeypatch):
    seen = []
    monkeypatch.setattr("haste.cli.commands.train", seen.append)
    main(["train", "--preset", "digits", "--seed", "5", "--batch_size", "32", "--attn-coeff", "0"])
    main(["train", "--preset=digits"])
    (changed, plain) = seen
    assert (changed.seed, changed.batch_size, changed.attn_coeff) == (5, 32, 0.0)
    assert plain == command_config(["--preset", "digits"])
    assert plain.data_dir == "digits" and changed.model == plain.model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "letters"], "haste train: --preset must be digits, haste-xl-256 or another"),
        (["--preset", "digits", "--model", "SiT-Q/2"], "haste train: --model must be one of"),
        (
            ["--preset", "digits", "--batch-size", "0"],
            "haste train: --batch-size must be an integer from 1 to 1,048,576, got 0\n",
        ),
        ([], "haste train: --exp-name must be the name of the run, got nothing"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(capsys, arguments, sentence):
    code, out, err = run_expecting_exit(capsys, "train", *arguments)
    assert code == 2 and out == ""
    assert err.startswith(sentence) and err.count("\n") == 1


def test_preset_without_a_name_lists_them_all_with_what_they_set(capsys):
    code, out, _ = run_expecting_exit(capsys, "train", "--preset")
    assert code == 0
    assert "\ndigits\n" in "\n" + out
    assert (
        "\nhaste-xl-512\n  --exp-name haste-xl-512 --resolution 512 --model SiT-XL/2 --attn-coeff 0.5 "
        "--layer-map 4:8,5:9,6:10,7:11 --encoder-depth 8 --early-stop-point 300000\n"
    ) in out


PUBLISHED = {
    "HASTE": """--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v
        --weighting=uniform --model=SiT-XL/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --attn-coeff=0.5 --encoder-depth=8
        --output-dir=exps --exp-name=linear-dinov2-b-enc8-es250k --batch-size 256 --early-stop-point=250000
        --data-dir=data""",
    "REPA": """--report_to=wandb --allow_tf32 --mixed_precision=fp16 --seed=0 --path_type=linear --prediction=v
        --weighting=uniform --model=SiT-XL/2 --enc_type=dinov2-vit-b --proj_coeff=0.5 --encoder_depth=8
        --output_dir=exps --exp_name=linear-dinov2-b-enc8 --data_dir=data --logging_dir=logs --resume_step=0
        --num_classes=1000 --no-fused-attn --qk-norm --resolution=256 --epochs=1400 --max-train-steps=400000
        --checkpointing-steps=50000 --gradient-accumulation-steps=1 --learning-rate=1e-4 --adam-beta1=0.9
        --adam-beta2=0.999 --adam-weight-decay=0. --adam-epsilon=1e-08 --max-grad-norm=1.0 --num-workers=4
        --cfg-prob=0.1 --no-legacy""",
}


@pytest.mark.parametrize("trainer", PUBLISHED)
def test_the_published_commands_mean_what_they_meant(trainer, monkeypatch):
    seen = []
    monkeypatch.setattr("haste.cli.commands.train", seen.append)
    main(["train", *PUBLISHED[trainer].split()])
    (config,) = seen
    config.check()
    assert config.model == "SiT-XL/2" and config.allow_tf32 and config.mixed_precision == "fp16"
    assert config.trackers == ["wandb"] and config.encoder_depth == 8 and config.proj_coeff == 0.5
    if trainer == "REPA":
        assert config.exp_name == "linear-dinov2-b-enc8" and config.qk_norm and not config.fused_attn
        assert config.num_classes == 1000 and config.adam_epsilon == 1e-8
        assert not config.aligns_attention and config.early_stop_point == -1
    else:
        assert config.early_stop_point == 250_000 and config.attn_coeff == 0.5 and config.batch_size == 256


def test_a_command_that_goes_on_need_not_say_again_how_the_run_was_begun(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr("haste.cli.commands.train", seen.append)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text('{"attn_coeff": 0.5, "early_stop_point": 7, "seed": 3, "batch_size": 8}')
    (tmp_path / "a" / "log.txt").write_text("[2025-01-01] Experiment directory created\n")
    main(["train", "--output_dir", str(tmp_path), "--exp-name=a", "--seed", "4"])
    (config,) = seen
    assert (config.attn_coeff, config.early_stop_point, config.seed, config.batch_size) == (0.5, 7, 4, 8)
    assert "a: --attn-coeff 0.5 --early-stop-point 7 --batch-size 8\n" in capsys.readouterr().err


def test_launchers_that_take_a_module_find_one(tmp_path):
    command = [sys.executable, "-m", "haste", "train", "--batch-size", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--exp-name must be the name of the run" in result.stderr


def test_a_tracker_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("haste.training.logging.importlib.util.find_spec", lambda name: None)
    code, _, err = run_expecting_exit(
        capsys, "train", "--preset", "digits", "--report-to", "wandb", "--output-dir", str(tmp_path)
    )
    assert code == 2 and "--report-to must name installed packages, got wandb; pip install wandb" in err


def test_user_errors_of_any_command_are_one_line(monkeypatch, capsys):
    def fail(command, arguments):
        raise UserError("the sky is green; it must be blue")

    monkeypatch.setattr(main_module, "run", fail)
    assert run_expecting_exit(capsys, "sample") == (2, "", "haste sample: the sky is green; it must be blue\n")


def test_a_program_error_is_not_hidden(monkeypatch):
    def fail(command, arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_train_from_the_command_line(tmp_path, capsys):
    plain = ["--attn-coeff", "0", "--proj-coeff", "0", "--model", "SiT-Digits/2", "--batch-size", "4"]
    small = ["--max-train-steps", "2", "--logging-steps", "1"]
    command = ["train", "--preset", "digits", "--output-dir", str(tmp_path), "--exp-name", "plain", *plain, *small]
    main(command)
    assert f"trained 2 steps; everything is in {tmp_path / 'plain'}" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run_expecting_exit(capsys, *command, "--seed", "1")
    assert code == 2 and err.endswith("holds a run with --seed 0, not 1\n")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    log = (tmp_path / "plain" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    assert json.loads((tmp_path / "plain" / "args.json").read_text())["preset"] == "digits"
