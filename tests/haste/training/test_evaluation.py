"""FD while training: the same numbers as afterwards, and training as it is without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from haste.errors import UserError
from haste.evaluation.evaluate import evaluate
from haste.training import evaluation
from haste.training.checkpoint import checkpoint_path
from haste.training.config import TrainConfig
from haste.training.evaluation import TrainingEvaluation
from haste.training.logging import Metrics
from haste.training.trainer import Trainer, train
from training_runs import assert_same_bits, final_state, read_log


@pytest.fixture
def make_evaluated(make_config, teacher_folder):
    """A run that is evaluated at steps 5, 10 and 12, in the 16 features of the tiny teacher."""
    settings = {"evaluation_steps": 5, "evaluation_samples": 22, "evaluation_features": str(teacher_folder),
                "evaluation_reference": "digits", "sampling_steps": 0}  # fmt: skip
    return lambda **changes: make_config(**{**settings, **changes})


def scores(result) -> dict[int, float]:
    return {line["step"]: line["fd"] for line in read_log(result.folder) if "fd" in line}


def test_a_run_has_scores_and_is_the_run_without_them(make_evaluated, make_config):
    seen = train(make_evaluated(exp_name="seen"))
    assert list(scores(seen)) == [5, 10, 12]
    assert all(value > 0 for value in scores(seen).values())
    blind = train(make_config(exp_name="blind", sampling_steps=0))
    assert_same_bits(final_state(seen), final_state(blind))


def test_scores_are_those_of_haste_evaluate(make_evaluated, teacher_folder):
    result = train(make_evaluated(max_train_steps=5))
    checkpoint = checkpoint_path(result.folder / "checkpoints", 5)
    found = evaluate(checkpoint, str(teacher_folder), "digits", num_images=22, batch_size=4, metrics=("fd",))
    assert scores(result) == {5: found["fd"].value}


def test_a_kill_after_an_evaluation_loses_nothing_and_counts_nothing_twice(make_evaluated, monkeypatch):
    unbroken = train(make_evaluated(exp_name="unbroken", evaluation_steps=4))
    with monkeypatch.context() as patch:
        save = Trainer._save
        patch.setattr(Trainer, "_save", lambda self, must: save(self, must) if self.step < 8 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_evaluated(evaluation_steps=4))
    result = train(make_evaluated(evaluation_steps=4))
    assert [line["step"] for line in read_log(result.folder)] == list(range(1, 13))
    assert scores(result) == scores(unbroken) and list(scores(result)) == [4, 8, 12]
    assert_same_bits(final_state(result), final_state(unbroken))


def test_evaluations_are_no_part_of_the_measured_time(make_evaluated, monkeypatch):
    """The clock starts again after each, before the next step."""
    seen = []
    for owner, name in ((TrainingEvaluation, "measure"), (Metrics, "start_clock"), (Trainer, "_train_step")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given, o=original, n=name: (seen.append(n), o(self, *given))[1])
    train(make_evaluated(max_train_steps=6, checkpointing_steps=100, logging_steps=100))
    first = seen.index("measure")
    assert seen[first - 1 : first + 3] == ["start_clock", "measure", "start_clock", "_train_step"]


def test_what_cannot_be_scored_is_told_and_training_goes_on(make_evaluated, monkeypatch, caplog):
    def broken(*args):
        raise UserError("the weights are broken")

    monkeypatch.setattr(TrainingEvaluation, "_sample", broken)
    result = train(make_evaluated(max_train_steps=5))
    assert result.step == 5 and scores(result) == {}
    assert "step 5: the evaluation lacks scores: the weights are broken" in caplog.text


@pytest.mark.parametrize(("count", "processes"), [(10, 1), (10, 2), (9, 4), (3, 3)])
def test_the_processes_share_the_images_in_as_many_batches_each(count, processes):
    plans = []
    for number in range(processes):
        accelerator = SimpleNamespace(process_index=number, num_processes=processes)
        share = SimpleNamespace(accelerator=accelerator, count=count, local_size=2)
        plans.append(TrainingEvaluation._batches(share))
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(index for plan in plans for batch in plan for index in batch) == list(range(count))


def test_random_numbers_of_an_evaluation_are_not_those_of_training(make_evaluated, monkeypatch):
    def noisy(self, *args):
        torch.rand(7)
        return sample(self, *args)

    sample = TrainingEvaluation._sample
    config = make_evaluated(max_train_steps=6)
    expected = final_state(train(config))
    monkeypatch.setattr(evaluation.TrainingEvaluation, "_sample", noisy)
    assert_same_bits(final_state(train(make_evaluated(exp_name="noisy", max_train_steps=6))), expected)


def test_a_run_keeps_what_it_is_scored_by(make_evaluated):
    train(make_evaluated(max_train_steps=2))
    train(make_evaluated(max_train_steps=3, evaluation_steps=0, evaluation_features=None, evaluation_reference=None))
    train(make_evaluated(max_train_steps=4, evaluation_samples=30))  # the run had none until now
    with pytest.raises(UserError, match="--evaluation-samples 30, not 22"):
        train(make_evaluated(max_train_steps=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dir": "images"}, "--evaluation-features must be given"),
        ({"data_dir": "images", "evaluation_features": "inception:x.pt"}, "--evaluation-reference must be given"),
        ({"evaluation_steps": 0, "evaluation_features": "digits"}, "--evaluation-steps must be above 0 with"),
        ({"evaluation_samples": 0}, "--evaluation-samples must be"),
        ({"evaluation_steps": -1}, "--evaluation-steps must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    config = TrainConfig(**{"exp_name": "x", "data_dir": "digits", "evaluation_steps": 10, **settings})
    with pytest.raises(UserError, match=message):
        config.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation_samples": 16}, "--evaluation-samples must be above 16, the number of features"),
        ({"evaluation_features": "inception"}, "--evaluation-features must be inception:PATH"),
        ({"evaluation_reference": "nowhere"}, "--evaluation-reference must be a folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_step(make_evaluated, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(make_evaluated(**settings))
    assert not (tmp_path / "run").exists()
