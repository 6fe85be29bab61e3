"""How many bytes a training step keeps for its backward pass, with --gradient-checkpointing and without.

    python benchmarks/train_step/kept_activations.py --model SiT-S/1 --batch 1

Counts what autograd saves in a forward pass on the CPU, each memory once, of the model in float32 with fused attention;
weights, gradients, optimizer and teacher are not counted. With checkpointing the backward pass holds, besides, what one
block keeps, which is counted by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from haste.models import build_model, find_size, get_family
from haste.training.state import recompute_in_backward
from torch import Tensor, nn


def kept_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Of the memory that autograd saves in `run`, without the model's own."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # alive, so that no memory is used twice

    def pack(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            kept[where] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/1", help="a SiT's size")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input-size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    given = parser.parse_args()
    _, size = find_size(given.model)
    model = build_model({**size, "input_size": given.input_size, "in_channels": given.channels}).eval()
    x = torch.randn(given.batch, given.channels, given.input_size, given.input_size)
    inputs = (x, torch.rand(given.batch), torch.zeros(given.batch, dtype=torch.int64))
    blocks = get_family(model).blocks(model)
    tokens, c = (value.detach() for value in model.embed(*inputs))
    one = kept_bytes(lambda: blocks[0](tokens.requires_grad_(), c), model)
    whole = kept_bytes(lambda: model(*inputs), model)
    recompute_in_backward(blocks, dropout=False)
    less = kept_bytes(lambda: model(*inputs), model)
    print(f"{given.model}, batch {given.batch}, float32: {whole / 2**20:.0f} MiB kept; with --gradient-checkpointing "
          f"{less / 2**20:.0f} MiB, and {one / 2**20:.0f} MiB of one block in the backward pass")  # fmt: skip


if __name__ == "__main__":
    main()
