import torch
from haste.models import SiT
from haste.training.state import EMA, reorder_state, with_projectors
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


SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2,
    "num_classes": 10, "encoder_depth": 2,
}  # fmt: skip


def random_sit(**changes) -> SiT:
    torch.manual_seed(0)
    model = SiT(**{**SHAPE, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


WITH_PROJECTORS = {"z_dims": (6,), "projector_dim": 8}


def test_projectors_go_back_to_their_place_and_an_optimizers_state_goes_with_the_names():
    whole = random_sit(**WITH_PROJECTORS).state_dict()
    projectors = {name: value for name, value in whole.items() if name.startswith("projectors.")}
    trunk = {name: value for name, value in whole.items() if name not in projectors}
    assert list(with_projectors(trunk, projectors, list(whole))) == list(whole)
    assert list(with_projectors(trunk, projectors, [*trunk, *projectors])) == [*trunk, *projectors]
    assert list(with_projectors(trunk, {}, list(trunk))) == list(trunk)
    assert reorder_state({0: "a", 2: "c"}, ["a", "b", "c"], ["c", "x", "a", "b"]) == {0: "c", 2: "a"}
