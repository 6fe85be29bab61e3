import torch
from haste.training.optimizer import reorder_state
from haste.training.state import EMA, with_projectors
from small_models import WITH_PROJECTORS, random_sit
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


def test_projectors_go_back_to_their_place_and_an_optimizers_state_goes_with_the_names():
    whole = random_sit(**WITH_PROJECTORS).state_dict()
    projectors = {name: value for name, value in whole.items() if name.startswith("projectors.")}
    trunk = {name: value for name, value in whole.items() if name not in projectors}
    assert list(with_projectors(trunk, projectors, list(whole))) == list(whole)
    assert list(with_projectors(trunk, projectors, [*trunk, *projectors])) == [*trunk, *projectors]
    assert list(with_projectors(trunk, {}, list(trunk))) == list(trunk)
    assert reorder_state({0: "a", 2: "c"}, ["a", "b", "c"], ["c", "x", "a", "b"]) == {0: "c", 2: "a"}
