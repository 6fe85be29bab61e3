"""The optimizer: AdamW, or Muon for the matrices of the blocks and AdamW for all else; and the order of its state.

An optimizer's state has no names: in a checkpoint it counts the parameters in the order of the model, whatever their
groups are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haste.training.config import TrainConfig

# ---- which parameter is whose ----


def muon_matrices(model: nn.Module, blocks: Sequence[nn.Module]) -> set[str]:
    """The names of the parameters that Muon trains: those of the blocks with two dimensions.

    Embeddings, the final layer and projectors are AdamW's, as are biases and norms (Keller Jordan's rule; SR-DiT's
    trainer, arXiv 2512.12386, gives Muon the blocks of a SiT, their adaLN modulation among them). A joint projection
    to q, k and v is one matrix.
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {name for name, value in model.named_parameters() if id(value) in inside and value.dim() == 2}


def parameter_groups(
    parameters: Mapping[str, Tensor], adam_decay: str, matrices: Collection[str] = ()
) -> list[list[str]]:
    """The names in each group of the optimizer: AdamW's, all in one, or for "matrices" first those without weight
    decay; then Muon's, if there are any."""
    own = [name for name in parameters if name not in matrices]
    of_muon = [[name for name in parameters if name in matrices]] if matrices else []
    if adam_decay == "all":
        return [own, *of_muon]
    # As timm and MAR: positions and other tables have more dimensions, and decay.
    without = [name for name in own if parameters[name].dim() < 2 or name.endswith(".bias")]
    return [without, [name for name in own if name not in without], *of_muon]


# ---- the optimizer ----


class MuonAndAdamW:
    """Both as one optimizer, whose groups and state are AdamW's, then Muon's.

    `found_inf`, a tensor as AdamW has it, or None: where it is 1, a step changes nothing. Torch's Muon does not look at
    it, so the host must: a step waits for the device.
    """

    def __init__(self, adamw: torch.optim.Optimizer, muon: torch.optim.Optimizer) -> None:
        self.both = (adamw, muon)
        self.found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.both for group in each.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """Of each parameter."""
        return {parameter: state for each in self.both for parameter, state in each.state.items()}

    @property
    def _first_of_muon(self) -> int:
        return sum(len(group["params"]) for group in self.both[0].param_groups)

    def step(self) -> None:
        if self.found_inf is None or not self.found_inf.item():
            for each in self.both:
                each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.both:
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer: state by the number of the parameter, AdamW's first."""
        first, second = (each.state_dict() for each in self.both)
        moved = {self._first_of_muon + number: state for number, state in second["state"].items()}
        return {"state": {**first["state"], **moved}, "param_groups": first["param_groups"] + second["param_groups"]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load the state of `state_dict`; the groups stay as they are."""
        begin = self._first_of_muon
        of_each: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
        for number, state in saved["state"].items():
            of_each[number >= begin][number - begin * (number >= begin)] = state
        for each, state in zip(self.both, of_each, strict=True):
            each.load_state_dict({**each.state_dict(), "state": state})


def build_optimizer(groups: Sequence[Sequence[Tensor]], config: TrainConfig) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimizer of --optimizer for the parameters of `parameter_groups`.

    Muon orthogonalizes the momentum (0.95, Nesterov's) of each matrix by five Newton-Schulz steps, and scales it to the
    size of AdamW's updates, 0.2·√(larger side) (arXiv 2502.16982, "match_rms_adamw"), so both have one learning rate
    and one weight decay.
    """
    adams = list(groups[:-1] if config.optimizer == "muon" else groups)
    without_decay = {"weight_decay": 0.0} if len(adams) > 1 else {}
    adamw = torch.optim.AdamW(
        [{"params": list(group), **(without_decay if number == 0 else {})} for number, group in enumerate(adams)],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    if config.optimizer == "adamw":
        return adamw
    muon = torch.optim.Muon(
        list(groups[-1]),
        lr=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(adamw, muon)


def reorder_state(state: Mapping[int, Any], source: Sequence[str], target: Sequence[str]) -> dict[int, Any]:
    """The optimizer state of parameters in the order `source`, for an optimizer whose order is `target`."""
    place = {name: number for number, name in enumerate(source)}
    return {number: state[place[name]] for number, name in enumerate(target) if name in place and place[name] in state}
