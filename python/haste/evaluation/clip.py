"""The CLIP score: how well images show what their captions say.

    score = mean of max(100·cos(E_image, E_text), 0)

over all images with their captions, with the two projections of a CLIP model (Hessel et al., arXiv 2104.08718, who have
2.5 in place of 100). Any CLIPModel of transformers serves, from a folder or by its name on the hub; only scores of one
model can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from haste._compat import without_load_report
from haste.data.images import ImageSet
from haste.errors import UserError
from haste.io import loading_arguments
from haste.metrics.features import (
    Features,
    channels_first,
    choose_device,
    digest_of_weights,
    extract,
    resize_smoothly,
    single_precision,
)
from haste.teachers.families import find_family
from haste.teachers.loading import load_config, load_normalisation, own_image_size
from haste.text import TextFormat, resolve_encoder
from haste.weights import reason

SCALE = 100.0
FLAG = "--clip"


class ClipExtractor:
    """The two sides of a CLIP model; its features of images are the projected ones, of norm 1.

    Args:
        name: a folder of save_pretrained() with a tokenizer, or a hub name.

    Attributes:
        truncated: captions so far that had more tokens than the model takes.

    Raises:
        UserError: it cannot be loaded, or is no CLIP of images and texts.
    """

    classes: int | None = None
    held_out_accuracy = math.nan

    def __init__(self, name: str) -> None:
        source = resolve_encoder(name, FLAG)
        self.name = Path(name).name
        self.truncated = 0
        try:
            vision = load_config(name, source, FLAG)
            self._normalisation = load_normalisation(name, source, find_family(name, vision), vision.num_channels)
        except UserError as error:
            raise UserError(f"{FLAG} must be a CLIP model, got {name}: {error}") from error
        if not vision.model_type.startswith("clip"):
            raise UserError(f"{FLAG} must be a CLIP model of images and texts, got {name}, a {vision.model_type}")
        self.pixels, self.channels = own_image_size(name, vision), vision.num_channels
        self.tokens = TextFormat.of(name, FLAG).tokens
        self._model = _load_model(name, source).to(choose_device())
        self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **loading_arguments(source))
        self.dimension: int = self._model.config.projection_dim
        short = re.sub(r"[^\w.-]+", "-", self.name)
        self.key = f"clip-{short}-{digest_of_weights(self._model)}"

    @property
    def device(self) -> torch.device:
        return self._model.device

    def describe(self) -> str:
        return f"CLIP {self.name} at {self.pixels} pixels"

    @torch.no_grad()
    @single_precision()
    def __call__(self, images: np.ndarray) -> Features:
        """Of images (n, H, W, 3) uint8."""
        pixels = center_square(channels_first(images).to(self.device), self.pixels) / 255.0
        if self.channels == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in self._normalisation)
        pooled = self._model.vision_model(pixel_values=(pixels - mean) / std).pooler_output
        return Features(_unit(self._model.visual_projection(pooled)))

    @torch.no_grad()
    @single_precision()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Projected features (n, D) of texts, of norm 1. Tokens beyond the longest input are cut off and counted."""
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]
        self.truncated += sum(length > self.tokens for length in lengths)
        parts = []
        for start in range(0, len(texts), batch_size):
            words = self._tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.tokens,
                return_tensors="pt",
            ).to(self.device)
            inputs = {name: words[name] for name in ("input_ids", "attention_mask")}
            parts.append(_unit(self._model.text_projection(self._model.text_model(**inputs).pooler_output)))
        return np.concatenate(parts)

    def scores(
        self, images: ImageSet, captions: Sequence[str], batch_size: int = 64, cache: Path | None = None
    ) -> np.ndarray:
        """max(100·cos, 0) of each image with its caption, (N,) float64, under a progress bar.

        Args:
            captions: one for each image.
            cache: as in `extract`.
        """
        if len(captions) != len(images):
            raise UserError(f"captions must be {len(images)}, one for each image, got {len(captions)}")
        shown = extract(self, images, batch_size, cache, title="CLIP").values
        distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        said = self.encode_texts(list(distinct), batch_size)[[distinct[caption] for caption in captions]]
        return np.maximum(SCALE * np.einsum("nd,nd->n", shown.astype(np.float64), said.astype(np.float64)), 0.0)


def center_square(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 to float32 (N, C, size, size), 0 … 255: the shorter side becomes `size` (bicubic with
    antialiasing, as Pillow), then the centre is cut out, as CLIP's own preprocessing does."""
    height, width = images.shape[-2:]
    if height == width:
        return resize_smoothly(images, size)
    ratio = size / min(height, width)
    sides = tuple(size if side == min(height, width) else int(side * ratio) for side in (height, width))
    resized = F.interpolate(images.float(), sides, mode="bicubic", antialias=True).round().clamp(0.0, 255.0)
    top, left = ((side - size) // 2 for side in sides)
    return resized[:, :, top : top + size, left : left + size]


def _unit(features: Tensor) -> np.ndarray:
    """Rows of norm 1, float32."""
    return F.normalize(features.float(), dim=-1).cpu().numpy()


def _load_model(name: str, source: str) -> nn.Module:
    arguments: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **loading_arguments(source)}
    try:
        with without_load_report():
            model, info = CLIPModel.from_pretrained(source, **arguments)
    except Exception as error:  # transformers', safetensors' or the hub's own errors
        raise UserError(f"{FLAG} must be a CLIP model, got {name}: {reason(error)}") from error
    if info["missing_keys"]:  # of half a model, such as a text encoder alone; transformers makes up the rest
        lacking = min(info["missing_keys"])
        raise UserError(f"{FLAG} must be a CLIP model of images and texts, got {name}, whose weights lack {lacking}")
    return model.eval().requires_grad_(False)
