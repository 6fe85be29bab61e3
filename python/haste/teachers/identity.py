"""Whether two names mean the same teacher, told by their configs: no weights are loaded and no hub is asked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from haste.errors import UserError
from haste.teachers.config import load_config
from haste.teachers.digits import DIGITS_TEACHER, DigitsTeacherSettings
from haste.teachers.grids import own_image_size, patch_size_of
from haste.teachers.names import PUBLISHED_NAMES, resolve_teacher


class Shape(NamedTuple):
    """What a config says of an encoder. image_size: pixels per side that it was configured for."""

    model_type: str
    width: int
    depth: int
    patch: int
    image_size: int


# As the configs on the hub have it.
PUBLISHED_SHAPES = {
    "dinov2-vit-s": Shape("dinov2", 384, 12, 14, 518),
    "dinov2-vit-b": Shape("dinov2", 768, 12, 14, 518),
    "dinov2-vit-l": Shape("dinov2", 1024, 24, 14, 518),
    "dinov2-vit-g": Shape("dinov2", 1536, 40, 14, 518),
    "dinov2reg-vit-s": Shape("dinov2_with_registers", 384, 12, 14, 518),
    "dinov2reg-vit-b": Shape("dinov2_with_registers", 768, 12, 14, 518),
    "dinov2reg-vit-l": Shape("dinov2_with_registers", 1024, 24, 14, 518),
    "dinov2reg-vit-g": Shape("dinov2_with_registers", 1536, 40, 14, 518),
    "dinov1-vit-b": Shape("vit", 768, 12, 16, 224),
    "clip-vit-L": Shape("clip_vision_model", 1024, 24, 14, 224),
    "mae-vit-l": Shape("vit_mae", 1024, 24, 16, 224),
    "jepa-vit-h": Shape("ijepa", 1280, 32, 14, 224),
    "dinov3-vit-s": Shape("dinov3_vit", 384, 12, 16, 224),
    "dinov3-vit-b": Shape("dinov3_vit", 768, 12, 16, 224),
    "dinov3-vit-l": Shape("dinov3_vit", 1024, 24, 16, 224),
    "dinov3-vit-h": Shape("dinov3_vit", 1280, 32, 16, 224),
    "siglip2-vit-b": Shape("siglip_vision_model", 768, 12, 16, 256),
    "siglip2-vit-l": Shape("siglip_vision_model", 1024, 24, 16, 256),
    "siglip2-vit-so": Shape("siglip_vision_model", 1152, 27, 16, 256),
    "siglip2naflex-vit-b": Shape("siglip2_vision_model", 768, 12, 16, 256),
    "siglip2naflex-vit-so": Shape("siglip2_vision_model", 1152, 27, 16, 256),
}


def same_teacher(one: str, other: str) -> bool | None:
    """Whether two names of --enc-type load the same teacher: the same name, or encoders of the same shape.

    None if a folder that one of them names is not here.
    """
    if _source(one) == _source(other):
        return True
    shapes = (shape_of(one), shape_of(other))
    if None not in shapes:
        return shapes[0] == shapes[1]
    missing = any(shape is None and _is_path(name) for name, shape in zip((one, other), shapes, strict=True))
    return None if missing else False


def own_resolution(name: str) -> int | None:
    """Pixels per side that a teacher was configured for; None if that is not known here."""
    shape = shape_of(name)
    return None if shape is None else shape.image_size


def shape_of(name: str) -> Shape | None:
    """Of a published name or a folder; None for another hub name and for a folder that is missing or no encoder's."""
    if name == DIGITS_TEACHER:
        settings = DigitsTeacherSettings()
        return Shape("dinov2", settings.hidden_size, settings.num_hidden_layers, settings.patch_size, 8)
    published = {PUBLISHED_NAMES[short]: shape for short, shape in PUBLISHED_SHAPES.items()}
    source = _source(name)
    if source in published:
        return published[source]
    if not Path(source).is_dir():
        return None
    try:
        config = load_config(name, source)
        width, depth = config.hidden_size, config.num_hidden_layers
        return Shape(config.model_type, width, depth, patch_size_of(name, config), own_image_size(name, config))
    except (UserError, AttributeError):
        return None


def _source(name: str) -> str:
    """A hub name, or the absolute path of a folder; what is neither stays."""
    try:
        source = resolve_teacher(name)
    except UserError:
        return name
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _is_path(name: str) -> bool:
    """Whether a name can be nothing but a path: it is no short name, and hub names have one slash."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1
