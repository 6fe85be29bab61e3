import math

import pytest
import torch
from accelerate import Accelerator
from haste.errors import UserError
from haste.training.config import TrainConfig
from haste.training.logging import Metrics, with_present_names

TINY = {"hidden_size": 16, "patch_size": 2, "input_size": 8, "in_channels": 1, "depth": 3}


@pytest.fixture
def make_meter():
    def make(watch_gradient=True, passes=1):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = None if watch_gradient else object()
        return Metrics(accelerator, TrainConfig(batch_size=4, gradient_accumulation_steps=passes), TINY)

    return make


def one_pass(meter, loss, attention=None):
    scalar = torch.tensor
    meter.add(scalar(loss), None, None if attention is None else scalar(attention), scalar(10 * loss))


def step(meter, loss, grad_norm=1.0, attention=None):
    one_pass(meter, loss, attention)
    meter.add_norm(torch.tensor(grad_norm))


def test_it_reads_means_since_the_last_time(make_meter):
    meter = make_meter()
    assert meter.read(0) is None
    step(meter, 1.0, grad_norm=3.0, attention=2.0)
    step(meter, 3.0, grad_norm=5.0, attention=4.0)
    record = meter.read(2)
    assert record.pop("images_per_second") > 0 and record.pop("teraflops") > 0 and record.pop("peak_memory_gib") > 0
    assert record.pop("mfu") is None  # nobody says what this processor could do
    assert record == {
        "loss": 2.0, "proj_loss": None, "attn_loss": 3.0, "total_loss": 20.0, "grad_norm": 4.0,
        "skipped_steps": 0,
    }  # fmt: skip
    step(meter, 7.0)
    assert meter.read(3)["loss"] == 7.0
    assert meter.read(3) is None


def test_what_comes_between_two_steps_is_not_counted(make_meter, monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 100.0, 104.0, 104.0])
    monkeypatch.setattr("haste.training.logging.time.perf_counter", lambda: next(clock))
    meter = make_meter()  # begins at 0
    step(meter, 1.0)
    assert meter.read(1)["images_per_second"] == 4 / 2
    meter.start_clock()  # at 100, after a checkpoint that took 98 seconds
    step(meter, 1.0)
    assert meter.read(2)["images_per_second"] == 4 / 4


def test_a_step_of_several_passes_counts_once(make_meter):
    meter = make_meter(passes=2)
    one_pass(meter, 1.0)
    step(meter, 2.0)
    step(meter, 4.5)
    assert meter.read(2)["loss"] == 3.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_first_step_that_is_not_finite_is_named(make_meter, loss):
    meter = make_meter()
    for value in (1.0, loss, 1.0, math.nan):
        step(meter, value)
    with pytest.raises(UserError, match="not finite at step 98 "):
        meter.read(100)


def test_an_infinite_gradient_is_an_error_only_where_it_is_watched(make_meter):
    for watch in (True, False):
        meter = make_meter(watch)
        step(meter, 1.0, grad_norm=math.inf)
        if watch:
            with pytest.raises(UserError, match="not finite at step 1 "):
                meter.read(1)
        else:
            assert meter.read(1)["loss"] == 1.0


def test_logs_with_the_former_names_are_read_as_the_present_ones():
    former = {"step": 3, "loss": 9.0, "velocity_loss": 1.0, "feature_loss": -0.5, "attention_loss": None,
              "grad_norm": 2.0, "aligned": True}  # fmt: skip
    present = {"step": 3, "aligned": True, "loss": 1.0, "proj_loss": -0.5, "attn_loss": None, "total_loss": 9.0,
               "grad_norm": 2.0}  # fmt: skip
    assert with_present_names(former) == present
    assert with_present_names(present) == present
