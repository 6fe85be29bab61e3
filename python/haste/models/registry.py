"""The families by name, and what is found by asking them: sizes, configs, models."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from haste.errors import UserError, in_one_line
from haste.models.family import OWN_SETTINGS, SIZES, CheckpointFile, Family, Layout
from haste.validation import shown

logger = logging.getLogger(__name__)

ENTRY_POINTS = "haste.families"  # the group under which other packages declare theirs
DEFAULT = "sit"  # of a config without "family", as all had before there were several


class _Unregistered(Family):
    """What a model of no family gets where training, probes and caches take any model: the defaults."""

    name, title, sizes = "none", "model", {}

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> nn.Module:
        raise UserError("the model is of no registered family; see haste.models.register")

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        raise UserError("the model is of no registered family; see haste.models.register")

    def layout(self, config: Mapping[str, Any]) -> Layout:
        raise UserError("the model is of no registered family; see haste.models.register")


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known; one of the same name is replaced.

    Raises:
        TypeError: it is no Family.
        ValueError: another family has a size of the same name.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be an instance of haste.models.Family, got {shown(family)}")
    for other in _FAMILIES.values():
        common = set(other.sizes) & set(family.sizes)
        if common and other.name != family.name:
            raise ValueError(f"the families {other.name} and {family.name} both have the size {min(common)}")
    _FAMILIES[family.name] = family
    return family


def get_family(of: str | Mapping[str, Any] | nn.Module) -> Family:
    """A family by its name, by a config, or by a model of it; for a model of none, one with all defaults.

    Raises:
        UserError: no family has that name.
    """
    if isinstance(of, nn.Module):
        if not hasattr(of, "family"):
            return _Unregistered()
        name = of.family
    else:
        name = of if isinstance(of, str) else of.get("family", DEFAULT)
    if isinstance(name, str) and name not in _FAMILIES:
        load_entry_points()
    if not isinstance(name, str) or name not in _FAMILIES:
        raise UserError(f"family must be one of {', '.join(_FAMILIES)}, got {str(name)[:60]!r}")
    return _FAMILIES[name]


def families() -> list[Family]:
    """All that are registered."""
    return list(_FAMILIES.values())


@cache
def load_entry_points() -> None:
    """Register the families of other installed packages: entry points of the group "haste.families".

    Each names a Family, or a subclass that is called without arguments. One that cannot be imported is warned of.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found = entry.load()
            register(found() if isinstance(found, type) else found)
        except Exception as error:  # another package's code
            logger.warning("the model family %s = %s is left out: %s", entry.name, entry.value, in_one_line(error))


def _all_families() -> Iterator[Family]:
    """The registered families; then, imported only if none of these is the one, those of other packages."""
    registered = families()
    yield from registered
    load_entry_points()
    yield from (family for family in families() if family not in registered)


def find_size(name: str) -> tuple[Family, dict[str, Any]]:
    """The family that has a size of this name, and its arguments, those that it leaves to its family included.

    Raises:
        UserError: none has; names --model and all sizes that there are.
    """
    for family in _all_families():
        if name in family.sizes:
            defaults = {key: value for key, value in family.settings.items() if key in SIZES}
            return family, {**defaults, **family.sizes[name]}
    known = [size for family in _FAMILIES.values() for size in family.sizes]
    raise UserError(f"--model must be one of {', '.join(known)}, got {name[:60]!r}")


def new_config(settings: Any, data: Any) -> dict[str, Any]:
    """The config of a new run's model.

    Args:
        settings: a TrainConfig, resolved.
        data: what is trained on; it has `channels`, `input_size` and `num_classes`.

    Raises:
        UserError: --model names no size, or one that is not conditioned on what the data has.
    """
    family, size = chosen_size(settings)
    config = family.config_for(size, settings, data)
    if getattr(data, "text", None) is not None and family.layout(config).condition_shape is None:
        raise UserError(f"--model must be conditioned on text, such as MM-DiT-COCO, for captions in --data-dir, got "
                        f"{settings.model}")  # fmt: skip
    return _named(family, config)


def _named(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    return config if family.name == DEFAULT else {"family": family.name, **config}


def chosen_size(settings: Any) -> tuple[Family, dict[str, Any]]:
    """The family of --model and the arguments of its size, with the settings' own --depth and so on in their place.

    Raises:
        UserError: --model names no size, or its family has no such argument or setting, or not such a value.
    """
    family, size = find_size(settings.model)
    for name, only in family.fixed.items():
        value = getattr(settings, name)
        if value != only:
            raise UserError(f"--{name.replace('_', '-')} must be {only} for {family.title}, got {value}")
    own = {name: getattr(settings, name) for name in SIZES if getattr(settings, name) is not None}
    for name in (*SIZES, *OWN_SETTINGS):
        value = getattr(settings, name)
        if value is not None and name not in (*size, *family.settings):
            flag, preset = name.replace("_", "-"), getattr(settings, "preset", "")
            hint = f"; if it is of --preset {preset}, that is for another --model" if preset else ""
            raise UserError(f"--{flag} must be left out for {family.title}, which has none, got {value}{hint}")
    return family, {**size, **own}


def own_settings(settings: Any) -> dict[str, Any]:
    """The OWN_SETTINGS of a TrainConfig, with the family's defaults for those that are open.

    Raises:
        UserError: --model names no size.
    """
    family, _ = find_size(settings.model)
    values = {name: getattr(settings, name) for name in family.settings if name in OWN_SETTINGS}
    return {name: family.settings[name] if value is None else value for name, value in values.items()}


def model_depth(settings: Any) -> int:
    """Layers with attention of the model that a TrainConfig chooses."""
    family, size = chosen_size(settings)
    return family.depth(size)


def infer_config(file: CheckpointFile, assume: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of weights that another trainer saved without one.

    Args:
        assume: settings of the run that the file may lack.

    Raises:
        UserError: the weights are of no family, or of a size that their family does not have; nothing tells of which
            of several families with weights of the same names they are. Names the file.
    """
    for family in _all_families():
        if family.foreign.find_convention(file) is None:
            continue
        try:
            config = family.infer_config(file.weights, {**(assume or {}), **file.args})
        except UserError as error:
            raise UserError(f"{file.path} cannot be used: {error}") from error
        if config is not None:
            return _named(family, config)
    titles, first = ", ".join(family.title for family in _FAMILIES.values()), next(iter(file.weights), "none")
    raise UserError(f"{file.path} cannot be used: the weights must be those of one of {titles}, and the first one is "
                    f"{first}")  # fmt: skip


def check_config(config: Any, source: str) -> dict[str, Any]:
    """The config that a file holds, held against what its family can have.

    Raises:
        UserError: it is none, or no model of the family can have it; names `source`.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"model_config of {source} must hold named values, and is {shown(config)}")
    family = get_family(config)
    checked = family.checked(config, source)
    return _named(family, checked)


def build_model(config: Mapping[str, Any], z_dims: Sequence[int] = ()) -> nn.Module:
    """A new model of any family.

    Args:
        config: the dictionary that a checkpoint holds as `model_config`. Its key "family" names the family; without
            it the model is a SiT.
        z_dims: one projector per entry, onto that many features.

    Raises:
        UserError: an unknown family, sizes that do not fit together.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"config must be a dictionary, as a checkpoint's model_config, got {shown(config)}")
    family = get_family(config)
    model = family.build({name: value for name, value in config.items() if name != "family"}, z_dims)
    model.family = family.name
    return model
