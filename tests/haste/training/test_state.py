import torch
import torch.distributed as dist
from haste.training.optimizer import reorder_state
from haste.training.state import EMA, with_projectors
from small_models import WITH_PROJECTORS, random_sit
from torch import nn
from torch.distributed.fsdp import fully_shard


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


def test_an_average_that_has_computed_something_is_still_updated_where_it_is_sharded(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        ema = EMA(model, decay=0.75)
        expected = [0.75 * p.detach() + 0.25 * (p.detach() + 1) for p in model.parameters()]
        mesh = dist.init_device_mesh("cpu", (1,))
        for each in (model, ema.model):
            fully_shard(each[0], mesh=mesh)  # the second layer is the root's
            fully_shard(each, mesh=mesh)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
            ema.model(torch.rand(1, 3))
        ema.update(model)
        for (name, average), value in zip(ema.model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(average.full_tensor(), value, msg=name)
    finally:
        dist.destroy_process_group()


def test_projectors_go_back_to_their_place_and_an_optimizers_state_goes_with_the_names():
    whole = random_sit(**WITH_PROJECTORS).state_dict()
    projectors = {name: value for name, value in whole.items() if name.startswith("projectors.")}
    trunk = {name: value for name, value in whole.items() if name not in projectors}
    assert list(with_projectors(trunk, projectors, list(whole))) == list(whole)
    assert list(with_projectors(trunk, projectors, [*trunk, *projectors])) == [*trunk, *projectors]
    assert list(with_projectors(trunk, {}, list(trunk))) == list(trunk)
    assert reorder_state({0: "a", 2: "c"}, ["a", "b", "c"], ["c", "x", "a", "b"]) == {0: "c", 2: "a"}
