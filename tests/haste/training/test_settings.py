"""Where a command's settings come from, and whether two settings come to the same run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import pytest
import torch
import tyro
from haste.errors import UserError
from haste.training.config import SECTIONS, TrainConfig, resolve, sections
from haste.training.presets import PRESETS
from haste.training.settings import command_config, differing_settings, write_config
from transformers import Dinov2Config

DIGITS = TrainConfig.from_preset("digits")


@pytest.fixture
def record(tmp_path):
    """Write the settings of a run as a trainer leaves them; returns the flags that lead to it."""

    def write(settings, as_checkpoint=False):
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        if as_checkpoint:
            parts = {"model": {}, "ema": {}, "opt": {}, "steps": 4, "args": argparse.Namespace(**settings)}
            torch.save(parts, run / "checkpoints" / "0000004.pt")
        else:
            (run / "args.json").write_text(json.dumps(settings))
            (run / "log.jsonl").write_text('{"step": 1}\n')
        return ["--output-dir", str(tmp_path), "--exp-name", "run"]

    return write


def test_what_is_not_typed_is_as_the_run_was_begun(record, capsys):
    changed = {"seed": 5, "attn_coeff": 0.25}
    # The prediction is recorded, though nobody gave it, and is that of the model, which may be another's here.
    flags = record({**asdict(TrainConfig()), **changed, "prediction": "v", "resume_step": 4, "exp_name": "old"})
    config = command_config([*flags, "--seed=5"])
    assert config == replace(TrainConfig(), **changed)
    said = capsys.readouterr().err
    assert said.startswith("using the recorded settings of ") and said.endswith("run: --attn-coeff 0.25\n")


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_a_run_of_repa_stays_one_and_a_run_of_haste_too(record, as_checkpoint):
    public = {"seed": 3, "model": "SiT-B/2", "cfg_prob": 0.0, "report_to": "none", "vae_type": "ema"}
    config = command_config(record(public, as_checkpoint))
    assert (config.seed, config.model, config.attn_coeff, config.early_stop_point) == (3, "SiT-B/2", 0.0, -1)
    assert config.cfg_prob == 0.1  # which is what REPA's trainer does


def test_a_run_of_haste_keeps_its_end(record):
    config = command_config(record({"attn_coeff": 0.5, "early_stop_point": 100_000}, as_checkpoint=True))
    assert (config.attn_coeff, config.early_stop_point) == (0.5, 100_000)


def test_the_preset_of_the_run_may_be_named_again_and_another_speaks_for_itself(record):
    flags = record({**asdict(DIGITS), "attn_coeff": 0.0, "max_train_steps": 7})
    again = command_config(["--preset=digits", *flags])
    assert again == replace(DIGITS, attn_coeff=0.0, max_train_steps=7)
    assert command_config(flags) == replace(DIGITS, attn_coeff=0.0, max_train_steps=7, exp_name="")
    assert command_config(["--preset", "repa-b-256", *flags]) == TrainConfig.from_preset("repa-b-256")


def test_a_run_recorded_under_former_names_is_ours_too(record):
    former = {"preset": "recipe", "checkpoints_total_limit": "keep"}
    recorded = {former.get(name, name): value for name, value in asdict(DIGITS).items()}
    config = command_config(["--preset", "digits", *record({**recorded, "cfg_prob": 0.2, "keep": 3})])
    assert config == replace(DIGITS, cfg_prob=0.2, checkpoints_total_limit=3)


@pytest.mark.parametrize("name", ["../run", "", "new"])
def test_where_no_run_is_nothing_is_followed(record, tmp_path, name):
    record({"seed": 5})
    arguments = ["--output-dir", str(tmp_path), "--exp-name", name]
    assert command_config(arguments) == TrainConfig()


def test_a_start_that_failed_before_any_log_line_leaves_nothing_to_follow(record, tmp_path):
    flags = record({**asdict(TrainConfig()), "seed": 5})
    (tmp_path / "run" / "log.jsonl").unlink()
    assert command_config(flags).seed == 0


def test_what_is_told_can_be_typed(record, capsys):
    command_config(record({"allow_tf32": True, "fused_attn": False, "vae": "my vae"}))
    assert "run: --vae 'my vae' --no-fused-attn --allow-tf32\n" in capsys.readouterr().err


def test_a_tracker_that_is_not_here_is_left_out_and_one_that_is_typed_is_not(record, capsys, monkeypatch):
    monkeypatch.setattr("haste.training.settings.importlib.util.find_spec", lambda name: name == "tensorboard" or None)
    flags = record({"report_to": "tensorboard,wandb"})
    assert command_config(flags).report_to == "tensorboard"
    assert "not logging to wandb" in capsys.readouterr().err
    assert command_config([*flags, "--report-to=wandb"]).report_to == "tensorboard,wandb"
    assert "not installed" not in capsys.readouterr().err


def test_help_reads_no_run(record):
    assert command_config([*record({"seed": "five"}), "--help"]) == TrainConfig()


def test_settings_that_cannot_be_read_are_refused_with_their_file(record):
    with pytest.raises(UserError, match=r"seed of .*args\.json must be an integer, got 'five'"):
        command_config(record({"seed": "five"}))


def test_an_incomplete_command_is_left_to_the_reader_of_flags():
    assert command_config(["--exp-name"]) == TrainConfig()
    assert command_config(["--exp-name", "a", "--resume-step", "x"]) == TrainConfig()
    for flag in ("--exp-name", "--output-dir", "--resume-step"):
        assert command_config(["--exp-name=a", f"{flag}=--"]) == TrainConfig()


REPA = TrainConfig(exp_name="a")
HASTE = replace(REPA, attn_coeff=0.5, early_stop_point=250_000)


def differences(old, new, **settings):
    """Between two runs that both have `settings` beside their own."""
    return differing_settings(asdict(replace(old, **settings)), replace(new, **settings))


def test_only_what_changes_the_computation_makes_another_run():
    moved = replace(REPA, max_train_steps=7, logging_steps=3, output_dir="there", data_dir="elsewhere")
    assert differing_settings(asdict(REPA), moved) == []
    assert differing_settings(asdict(REPA), replace(REPA, seed=1, batch_size=8)) == [
        "--seed 0, not 1",
        "--batch-size 256, not 8",
    ]


def test_what_another_trainer_had_no_setting_for_is_not_compared():
    assert differing_settings({"seed": 0, "use_wandb": True}, replace(REPA, attn_coeff=0.7)) == []


def test_a_run_of_before_a_switch_had_it_at_its_default():
    assert differing_settings({"seed": 0}, REPA) == []
    assert differing_settings({"seed": 0}, replace(REPA, time_shift=2.0)) == ["--time-shift 1.0, not 2.0"]
    assert differing_settings({"seed": 0}, replace(REPA, disp_coeff=0.5)) == ["--disp-coeff 0.0, not 0.5"]
    assert differing_settings({"enc_type": REPA.enc_type}, replace(REPA, spnorm_method="zscore")) == [
        "--spnorm-method none, not zscore"
    ]


LATER = {
    "time_shift": (1.0, 2.0), "optimizer": ("adamw", "muon"), "decay_shape": ("cosine", "linear"),
    "extra_ema_decays": ("", "0.9"), "random_flip": (False, True), "disp_coeff": (0.0, 0.5), "cls_coeff": (0.0, 0.03),
    "projection_layer_type": ("mlp", "conv"), "spnorm_method": ("none", "zscore"), "norm": ("layernorm", "rmsnorm"),
    "positions": ("sincos", "rope"), "mlp": ("gelu", "swiglu"), "adam_decay": ("all", "matrices"),
    "vae_stats": (None, "stats.pt"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_a_run_of_an_older_version_had_what_it_does_not_record_at_its_default(record, monkeypatch, name):
    old = {other: value for other, value in asdict(REPA).items() if other != name}
    before, now = LATER[name]
    (said,) = differing_settings(old, replace(REPA, **{name: now}))
    assert said == f"--{name.replace('_', '-')} {before}, not {now}"
    monkeypatch.setitem(PRESETS, "later", {name: now})  # a preset that has changed since
    config = command_config(["--preset", "later", *record({**old, "preset": "later"})])
    assert getattr(config, name) == getattr(REPA, name)


def test_settings_of_another_type_are_refused():
    with pytest.raises(UserError, match="seed of the settings of the run must be an integer, got 'none'"):
        differing_settings({"seed": "none"}, REPA)


@pytest.mark.parametrize(
    ("old", "new", "settings"),
    [
        (REPA, replace(REPA, num_classes=1000), {}),
        (replace(REPA, num_classes=1000), REPA, {}),
        (REPA, replace(REPA, encoder_depth=8), {}),
        (HASTE, replace(HASTE, encoder_depth=5), {"model": "SiT-B/2"}),
        (HASTE, replace(HASTE, layer_map="4:8, 5:9,6:10,7:11"), {}),
        (REPA, replace(REPA, layer_map="1:1"), {}),  # attention is not aligned
        (replace(HASTE, proj_coeff=0.0), replace(HASTE, proj_coeff=0.0, encoder_depth=3, projector_dim=7), {}),
        (replace(REPA, enc_type="None"), replace(REPA, proj_coeff=0.0), {}),
        (replace(REPA, enc_type="None"), replace(REPA, enc_type="None", attn_coeff=1.0, encoder_depth=99), {}),
        (REPA, replace(REPA, enc_type="facebook/dinov2-base"), {}),
        (REPA, replace(REPA, probe_start=1, probe_threshold=0.5, plateau_patience=9, ramp_start=7), {}),
        (REPA, replace(REPA, probe_threshold=0.5), {"termination": "plateau"}),
        (REPA, replace(REPA, probe_block=8), {"termination": "gradient-cosine"}),
        (REPA, replace(REPA, teacher_resolution=224), {}),
        (REPA, replace(REPA, teacher_resolution=518), {"teacher_grid": "interpolate"}),
        (HASTE, replace(HASTE, enc_type="dinov2-vit-b,clip-vit-L"), {"proj_coeff": 0.0}),
        (replace(REPA, cfg_prob=0.19), replace(REPA, cfg_prob=0.1, legacy=True), {}),
    ],
)
def test_what_comes_to_the_same_is_the_same_run(old, new, settings):
    assert differences(old, new, **settings) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (REPA, HASTE, ["--attn-coeff 0.0, not 0.5", "--early-stop-point -1, not 250000"]),
        (replace(REPA, enc_type="None"), REPA, ["--enc-type None, not dinov2-vit-b"]),
        (REPA, replace(REPA, encoder_depth=4), ["--encoder-depth 8, not 4"]),
        (HASTE, replace(HASTE, layer_map="4:8"), ["--layer-map 4:8,5:9,6:10,7:11, not 4:8"]),
        (REPA, replace(REPA, enc_type="dinov1-vit-b"), ["--enc-type dinov2-vit-b, not dinov1-vit-b"]),
        (REPA, replace(REPA, termination="plateau", probe_every=3), ["--termination fixed, not plateau"]),
        (replace(REPA, num_classes=10), replace(REPA, num_classes=1000), ["--num-classes 10, not 1000"]),
        (REPA, replace(REPA, legacy=True), ["--legacy False, not True"]),
    ],
)
def test_what_does_not_is_another_and_only_the_cause_is_told(old, new, said):
    assert differences(old, new) == said


def test_a_teachers_folder_is_the_teacher_of_its_name(tmp_path, caplog):
    for name, width in (("base", 768), ("other", 384)):
        config = Dinov2Config(hidden_size=width, num_attention_heads=12, image_size=518, patch_size=14)
        config.save_pretrained(tmp_path / name)
        with open(tmp_path / name / "model.safetensors", "wb") as weights:  # which nobody reads
            weights.truncate(2**28)
    assert differing_settings(asdict(REPA), replace(REPA, enc_type=str(tmp_path / "base"))) == []
    assert differing_settings(asdict(REPA), replace(REPA, enc_type=str(tmp_path / "other"))) != []
    assert caplog.text == ""
    gone = replace(REPA, enc_type=str(tmp_path / "gone"))
    assert differing_settings(asdict(gone), REPA) == []
    assert "cannot be compared with" in caplog.text


def test_a_public_run_dropped_one_label_in_ten_whatever_its_cfg_prob_said():
    assert differing_settings({"cfg_prob": 0.0, "legacy": False}, REPA) == []
    assert differing_settings({"cfg_prob": 0.1, "legacy": True}, replace(REPA, legacy=True)) == []
    assert differing_settings({"cfg_prob": 0.0}, replace(REPA, cfg_prob=0.0)) == ["--cfg-prob 0.1, not 0.0"]


@pytest.mark.parametrize(
    ("model", "attn_coeff", "depth"),
    [("SiT-B/2", 0.5, 5), ("SiT-S/2", 0.5, 5), ("SiT-XL/2", 0.5, 8), ("SiT-B/2", 0.0, 8), ("SiT-Digits/2", 0.0, 6)],
)
def test_the_depth_of_features_is_hastes_for_the_model_or_repas(model, attn_coeff, depth):
    config = replace(REPA, model=model, attn_coeff=attn_coeff, layer_map="0:0")
    assert resolve(config).encoder_depth == depth
    assert resolve(replace(config, encoder_depth=3)).encoder_depth == 3


def test_a_run_records_what_was_left_open():
    resolved = resolve(HASTE, num_classes=1000)
    assert (resolved.num_classes, resolved.encoder_depth, resolved.layer_map) == (1000, 8, "4:8,5:9,6:10,7:11")
    assert resolve(replace(HASTE, num_classes=10), num_classes=1000).num_classes == 10


# ---- files of settings ----


@pytest.fixture
def write_yaml(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path)]

    return write


def test_a_file_overrides_the_preset_a_recorded_run_the_file_and_flags_all(write_yaml, record):
    arguments = write_yaml(
        "run: {preset: digits, exp_name: run}\n"
        "optimizer: {batch_size: 8, learning_rate: 1e-3, mixed_precision: no}\n"
        "model:\n  depth: 2\n"
        "logging:\n"
    )
    config = command_config(arguments)
    assert (config.preset, config.exp_name, config.batch_size, config.depth) == ("digits", "run", 8, 2)
    assert (config.learning_rate, config.mixed_precision) == (1e-3, "no")
    assert config.model == "SiT-Digits/2"
    record({**asdict(config), "batch_size": 16})
    assert (command_config(arguments).batch_size, command_config(arguments).learning_rate) == (16, 1e-3)
    assert main_config([*arguments, "--batch-size", "32"]).batch_size == 32


def main_config(arguments):
    return tyro.cli(TrainConfig, args=arguments, default=command_config(arguments))


def test_a_typed_preset_lies_under_the_file_and_replaces_the_files_own(write_yaml):
    arguments = [*write_yaml("run: {preset: digits}\nalignment: {attn_coeff: 0.25}\n"), "--preset", "haste-b-256"]
    config = command_config(arguments)
    assert (config.preset, config.attn_coeff, config.model) == ("haste-b-256", 0.25, "SiT-B/2")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optimizer: {learning_rte: 1}", r"optimizer of .*run\.yaml must be one of batch_size, .*, got learning_rte"),
        ("model: {learning_rate: 1}", r"got learning_rate; learning_rate belongs to optimizer"),
        ("optimiser: {}", r"a key of .*run\.yaml must be one of run, data, model, .*, got optimiser"),
        ("seed: 1", r"got seed; seed belongs to run"),
        ("optimizer: {learning_rate: fast}", r"optimizer\.learning_rate of .*run\.yaml must be a number, .*'fast'"),
        ("optimizer: {batch_size: 2.5}", r"optimizer\.batch_size of .*run\.yaml must be an integer, .*2\.5"),
        ("optimizer: {mixed_precision: fp8}", r"optimizer\.mixed_precision of .*'bf16'.*'fp8'"),
        ("model: 3", r"model of .*run\.yaml must hold named values, got 3"),
        ("- 1", r"run\.yaml must hold named values"),
        ("a: [", r"--config must be a YAML file of settings, got .*run\.yaml"),
        ("run: !!python/object/apply:os.system ['true']", r"--config must be a YAML file of settings, got .*run\.yaml"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_its_key(write_yaml, text, sentence):
    with pytest.raises(UserError, match=sentence):
        command_config(write_yaml(text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config must be a YAML file of settings, got .*none\.yaml"):
        command_config(["--config", str(tmp_path / "none.yaml")])


def test_every_setting_survives_the_file_that_a_run_writes(tmp_path):
    config = replace(DIGITS, vae="ema", teacher_resolution=448, adam_epsilon=1e-12, depth=3, mixed_precision="no")
    write_config(tmp_path / "config.yaml", config)
    again = command_config(["--config", str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path)])
    assert replace(again, preset="digits") == config


def test_the_components_hold_every_setting_once():
    names = [name for settings in sections().values() for name in settings]
    assert sorted(names) == sorted(asdict(TrainConfig())) and len(set(names)) == len(names)
    assert list(sections()) == list(SECTIONS)


def test_sizes_that_are_those_of_the_model_are_no_change_and_others_are():
    old = {"model": "SiT-B/2", "seed": 0}  # of a version without them
    assert differing_settings(old, replace(REPA, model="SiT-B/2", depth=12, hidden_size=768)) == []
    assert differing_settings(old, replace(REPA, model="SiT-B/2", depth=6)) == ["--depth 12, not 6"]
    rope = {"model": "SiT-B/2", "positions": "rope"}
    assert differing_settings(rope, replace(REPA, model="SiT-B/2", positions="sincos")) == [
        "--positions rope, not sincos"
    ]
