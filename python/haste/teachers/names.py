"""From what a user types as --enc-type to what from_pretrained() takes."""

from __future__ import annotations

import os
from pathlib import Path

from haste.errors import UserError

# Short names and the same weights on the Hugging Face hub. REPA's and HASTE's commands use the first group.
PUBLISHED_NAMES = {
    "dinov2-vit-s": "facebook/dinov2-small",
    "dinov2-vit-b": "facebook/dinov2-base",
    "dinov2-vit-l": "facebook/dinov2-large",
    "dinov2-vit-g": "facebook/dinov2-giant",
    "dinov2reg-vit-s": "facebook/dinov2-with-registers-small",
    "dinov2reg-vit-b": "facebook/dinov2-with-registers-base",
    "dinov2reg-vit-l": "facebook/dinov2-with-registers-large",
    "dinov2reg-vit-g": "facebook/dinov2-with-registers-giant",
    "dinov1-vit-b": "facebook/dino-vitb16",
    "clip-vit-L": "openai/clip-vit-large-patch14",
    "mae-vit-l": "facebook/vit-mae-large",
    "jepa-vit-h": "facebook/ijepa_vith14_1k",
    # newer teachers
    "dinov3-vit-s": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-vit-b": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-vit-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "dinov3-vit-h": "facebook/dinov3-vith16plus-pretrain-lvd1689m",
    "siglip2-vit-b": "google/siglip2-base-patch16-256",
    "siglip2-vit-l": "google/siglip2-large-patch16-256",
    "siglip2-vit-so": "google/siglip2-so400m-patch16-256",
    "siglip2naflex-vit-b": "google/siglip2-base-patch16-naflex",
    "siglip2naflex-vit-so": "google/siglip2-so400m-patch16-naflex",
}

UNAVAILABLE = ("mocov3-vit-s", "mocov3-vit-b", "mocov3-vit-l")


def resolve_teacher(name: str) -> str:
    """A published short name becomes its hub name; a folder must exist and hold a config; a hub name stays.

    Raises UserError if a folder is missing or holds no config.json, or if the name is none of the three.
    """
    if name in PUBLISHED_NAMES:
        return PUBLISHED_NAMES[name]
    if name in UNAVAILABLE:
        raise UserError(
            f"the teacher {name} cannot be had: MoCo v3 is not among the models of transformers; take another, or give "
            "the folder of its weights saved as a ViTModel with save_pretrained()"
        )
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"the teacher folder {name} holds no config.json; save one there with save_pretrained()")
        return str(folder)
    if _looks_like_hub_name(name):
        return name
    known = ", ".join(PUBLISHED_NAMES)
    raise UserError(
        f"the teacher {name!r} does not exist; it must be a folder written by save_pretrained(), "
        f"a hub name such as facebook/dinov2-base, or one of {known}"
    )


def _looks_like_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/")
