import torch
from haste.training.state import EMA
from torch import nn


def test_the_average_follows_its_formula_and_is_apart_from_the_model():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.75)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for average, value in zip(ema.model.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value)
        assert not average.requires_grad
    assert not ema.model.training
