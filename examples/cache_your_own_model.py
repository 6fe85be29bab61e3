"""Cache the features of a transformer in a sampling loop of your own, and compare with the uncached images.

    python examples/cache_your_own_model.py --num-steps 50

The model may be haste's, or one of the SiT, DiT, REPA or HASTE repositories; here it is a small one.
The loop calls it as ever.
"""

from __future__ import annotations

import argparse
import time

import torch
from haste import disable_cache, enable_cache
from haste.models import SiT
from torch import Tensor, nn


def your_loop(model: nn.Module, x: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    """Euler steps along the velocity from noise, t = 1, to the images, t = 0."""
    for step in range(num_steps):
        t = torch.full((len(x),), 1 - step / num_steps)
        x = x - model(x, t, labels).prediction / num_steps
    return x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=50)
    num_steps = parser.parse_args().num_steps

    torch.manual_seed(0)
    model = SiT(input_size=16, in_channels=4, hidden_size=192, depth=8, num_heads=3, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # a new SiT returns zeros
    noise, labels = torch.randn(4, 4, 16, 16), torch.arange(4)

    begin = time.perf_counter()
    uncached = your_loop(model, noise, labels, num_steps)
    seconds = time.perf_counter() - begin
    print(f"uncached: {seconds:.2f} s")
    for settings in ({}, {"cache": "taylor", "granularity": "module", "interval": 4, "order": 2}):
        fast = enable_cache(model, num_steps=num_steps, **settings)
        begin = time.perf_counter()
        images = your_loop(fast, noise, labels, num_steps)
        seconds = time.perf_counter() - begin
        error = (images - uncached).norm() / uncached.norm()
        print(f"{settings or 'recommended'}: {seconds:.2f} s, relative error {error:.1e}")
        model = disable_cache(fast)


if __name__ == "__main__":
    main()
