"""Images with captions in REPA's layout, small: 64 x 64 pixels, 8 x 8 latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TOKENS, WIDTH = 5, 6


def write_captioned(
    folder: Path, count: int = 12, captions: int = 2, width: int = WIDTH, images: bool = True, logvar: float = -4
) -> Path:
    """Write <folder>/train with its empty caption beside it; returns the former."""
    random, train = np.random.default_rng(0), folder / "train"
    train.mkdir(parents=True)
    for number in range(count):
        if images:
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(train / f"{number}.png")
        mean, variance = random.normal(size=(4, 8, 8)), np.full((4, 8, 8), logvar)
        np.save(train / f"{number}.npy", np.concatenate([mean, variance]).astype(np.float32))
        for caption in range(captions):
            np.save(train / f"{number}_{caption}.npy", random.normal(size=(TOKENS, width)).astype(np.float32))
    np.save(folder / "empty_context.npy", random.normal(size=(TOKENS, width)).astype(np.float32))
    return train
