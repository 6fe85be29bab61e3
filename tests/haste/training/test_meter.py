import math

import pytest
import torch
from haste.errors import UserError
from haste.training.meter import Meter


def step(meter, loss, grad_norm=1.0, attention=None):
    scalar = torch.tensor
    meter.add(scalar(loss), scalar(loss), None, None if attention is None else scalar(attention), scalar(grad_norm))


def test_it_reads_means_since_the_last_time():
    meter = Meter(batch_size=4, watch_gradient=True)
    assert meter.read(0) is None
    step(meter, 1.0, grad_norm=3.0, attention=2.0)
    step(meter, 3.0, grad_norm=5.0, attention=4.0)
    record = meter.read(2)
    assert record.pop("images_per_second") > 0
    assert record == {
        "loss": 2.0, "velocity_loss": 2.0, "feature_loss": None, "attention_loss": 3.0, "grad_norm": 4.0
    }  # fmt: skip
    step(meter, 7.0)
    assert meter.read(3)["loss"] == 7.0
    assert meter.read(3) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_first_step_that_is_not_finite_is_named(loss):
    meter = Meter(batch_size=4, watch_gradient=True)
    for value in (1.0, loss, 1.0, math.nan):
        step(meter, value)
    with pytest.raises(UserError, match="not finite at step 98 "):
        meter.read(100)


def test_an_infinite_gradient_is_an_error_only_where_it_is_watched():
    for watch in (True, False):
        meter = Meter(batch_size=4, watch_gradient=watch)
        step(meter, 1.0, grad_norm=math.inf)
        if watch:
            with pytest.raises(UserError, match="not finite at step 1 "):
                meter.read(1)
        else:
            assert meter.read(1)["loss"] == 1.0
