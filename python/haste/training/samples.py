"""Grids of images that the EMA model samples during training, each time from the same noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from haste.data import TrainingData
from haste.data.images import to_uint8, write_image
from haste.distributed import unsharded
from haste.errors import UserError
from haste.io import write_text
from haste.models import get_family
from haste.samplers import Solver, initial_noise
from haste.training.config import TrainConfig
from haste.training.logging import Backlog
from haste.vae import VAE

logger = logging.getLogger(__name__)

COUNT, NUM_STEPS, CFG_SCALE = 16, 50, 4.0  # REPA's, but for the number of images
SMALLEST_SIDE, SMALLEST_CAPTIONED = 64, 128  # smaller images are enlarged, pixel by pixel
MARGIN, GREY = 2, 96  # around each image
TITLE_HEIGHT = 14  # above each image, and of a line of a caption below it
CAPTION_LINES = 6  # at most

MISSING = "missing.txt"  # in the folder, if no grids can be made: the reason


class TrainingSamples:
    """Writes <step>.png to a folder: images of classes or captions that are spread over the data, in a square grid.

    Args:
        noise_shape: of the noise of one image.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        data: TrainingData,
        accelerator: Accelerator,
        noise_shape: tuple[int, ...],
    ) -> None:
        self.folder = folder
        self.config = config
        self.data = data
        self.accelerator = accelerator
        self.noise_shape = noise_shape
        self._failed = False
        self._files = Backlog(str(folder))

    def sample(self, model: nn.Module, step: int) -> np.ndarray | None:
        """Sample and write the grid, (H, W, 3) uint8. The global random state is not changed.

        Every process must call it, as each may hold a shard of the model; only the first one gets the grid. A failure
        is logged once and does not stop training.
        """
        device = self.accelerator.device
        noise = initial_noise(
            (COUNT, *self.noise_shape), torch.Generator().manual_seed(self.config.seed), device=device
        )
        try:
            condition, titles = self.data.examples(COUNT)
            family = get_family(model)
            null = family.null(model)
            scale = 1.0 if null is None else CFG_SCALE
            channels = family.foreign.guided_channels("repa", self.noise_shape[0])  # of haste's own checkpoints
            solve = Solver(
                num_steps=NUM_STEPS, path=self.config.path_type, time_shift=self.config.time_shift, cfg_scale=scale,
                null=null, guided_channels=channels,
            )  # fmt: skip
            with unsharded(model) if family.in_parts else nullcontext():  # whose sampler takes the model apart
                sampled = family.sample(model, noise, family.condition(condition.to(device)), solve)
            if self._failed or not self.accelerator.is_main_process:
                return None
            if self.data.latents is not None:  # the VAE is loaded for this and freed
                sampled = VAE(self.data.latents).to(device).decode(sampled)
            grid = as_grid(to_uint8(sampled), titles, below=self.data.text is not None)
        except UserError as error:  # also raised for weights that give NaN
            if self.accelerator.is_main_process and not self._failed:
                logger.warning("no samples are made during training: %s", error)
                reason = f"{error}\n"
                self._files.add(lambda: write_text(self.folder / MISSING, reason))
            self._failed = True
            return None
        self._files.add(lambda: write_image(self.folder / f"{step:07d}.png", grid))
        return grid

    def close(self) -> None:
        """Try to write the grids that wait."""
        self._files.close()


def as_grid(images: np.ndarray, titles: Sequence[str], below: bool = False) -> np.ndarray:
    """(N, H, W, 3), N a square number, as one image, each under its title; or with `below` each above it, wrapped to
    the image's width, as captions are long."""
    side = math.isqrt(len(images))
    scale = max(1, (SMALLEST_CAPTIONED if below else SMALLEST_SIDE) // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width = images.shape[2]
    if below:
        images = np.concatenate([images, caption_bars(titles, width)], axis=1)
    else:
        images = np.concatenate([np.stack([title_bar(title, width) for title in titles]), images], axis=1)
    images = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=GREY)
    _, height, width, channels = images.shape
    rows = images.reshape(side, side, height, width, channels).transpose(0, 2, 1, 3, 4)
    return rows.reshape(side * height, side * width, channels)


def title_bar(title: str, width: int) -> np.ndarray:
    """A title, cut off at the width: (TITLE_HEIGHT, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (width, TITLE_HEIGHT), (GREY,) * 3)
    ImageDraw.Draw(bar).text((2, 1), _legible(title), fill=(255, 255, 255), font=ImageFont.load_default())
    return np.asarray(bar)


def caption_bars(captions: Sequence[str], width: int) -> np.ndarray:
    """Captions, wrapped at the width to as many lines as the longest needs: (N, lines * TITLE_HEIGHT, width, 3)."""
    from PIL import ImageFont

    font = ImageFont.load_default()
    wrapped = [wrap(_legible(caption), lambda text: font.getlength(text) <= width - 4) for caption in captions]
    count = max(map(len, wrapped))
    lines = [[*lines, *[""] * (count - len(lines))] for lines in wrapped]
    return np.stack([np.concatenate([title_bar(line, width) for line in each]) for each in lines])


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The words of a text on lines that fit, CAPTION_LINES at most; the last then ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= CAPTION_LINES else [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} ..."]


def _legible(text: str) -> str:
    """Text in the characters of Pillow's own font."""
    return text.encode("latin-1", "replace").decode("latin-1")
