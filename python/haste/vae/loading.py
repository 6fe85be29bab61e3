"""Finding and loading what --vae names: a folder or hub name of diffusers, or a file of an autoencoder of LDM."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from haste.errors import UserError, in_one_line
from haste.io import loading_arguments, read_json, require_source
from haste.vae import ldm
from haste.vae.kinds import KINDS, KL, Kind
from haste.validation import build, shown
from haste.weights import reason, require_weights

# --vae of REPA's and SiT's generate.py.
PUBLISHED_VAES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}


def resolve_vae(name: str) -> str:
    """What --vae names: mse, ema, a hub name, a folder with a config, or a file of weights. UserError for others."""
    if name in PUBLISHED_VAES:
        return PUBLISHED_VAES[name]
    folder = Path(name).expanduser()
    if name and folder.is_file():
        return str(folder.resolve())
    if name and folder.is_dir():
        inside = folder / "vae"  # the folder of a whole pipeline
        folder = inside if (inside / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise UserError(f"--vae must be a folder of save_pretrained(), got {name}, which has no config.json")
        return str(folder.resolve())
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/")
    if is_hub_name and not ldm.is_file_of_weights(name):
        return name
    raise UserError(
        f"--vae must be {', '.join(PUBLISHED_VAES)}, a hub name such as {PUBLISHED_VAES['mse']}, a folder of "
        f"save_pretrained(), or a file of LDM's, such as MAR's KL-16 or VA-VAE, got {name!r}, which does not exist"
    )


def read_kind(name: str, source: str) -> Kind:
    """The autoencoder of a resolved --vae by its config; `name` is for messages. Raises UserError."""
    if ldm.is_file_of_weights(source):
        return _kind_of(ldm.load_ldm(source))  # refuses a file of anything else before data and models are built
    return _read_config(name, source)[1]


def load_autoencoder(source: str) -> tuple[Kind, nn.Module]:
    """The autoencoder of a resolved --vae, in float32. Raises UserError if its weights cannot be loaded."""
    if ldm.is_file_of_weights(source):
        model = ldm.load_ldm(resolve_vae(source))
        return _kind_of(model), model

    import diffusers  # here, as it takes a second

    class_name, kind = _read_config(source, source)
    loader = getattr(diffusers, class_name)
    if Path(source).is_dir():

        def build_model() -> nn.Module:
            return loader.from_config(loader.load_config(source, local_files_only=True))

        require_weights(Path(source), f"the VAE {source}", build_model)
    try:
        model, report = loader.from_pretrained(source, output_loading_info=True, **loading_arguments(source))
    except Exception as error:  # of diffusers, safetensors or the hub
        raise UserError(f"the VAE {source} cannot be loaded: {reason(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"the VAE {source} cannot be loaded: its weights lack {report['missing_keys'][0]}")
    return kind, model.float()


def _kind_of(model: nn.Module) -> KL:
    return build(KL, dict(model.config), "the config of the VAE")  # type: ignore[arg-type]


def _read_config(name: str, source: str) -> tuple[str, Kind]:
    """The class of diffusers, and the kind with the values of the config."""
    require_source(name, source, "--vae")
    what = "the config of a VAE"
    if Path(source).is_dir():
        config = read_json(Path(source) / "config.json", what)
    else:
        from diffusers import AutoencoderKL

        try:
            config = AutoencoderKL.load_config(source, **loading_arguments(source))
        except Exception as error:  # of diffusers or the hub
            raise UserError(f"the VAE {name} cannot be loaded: {in_one_line(error)}") from error
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or class_name not in KINDS:
        wanted = ", ".join(KINDS)
        raise UserError(f"the VAE {name} must be one of {wanted}, got the class {shown(class_name)}")
    if config.get("quantization_config") is not None:
        raise UserError(f"the VAE {name} must have weights in float32, float16 or bfloat16, got quantised ones")
    kind = build(KINDS[class_name], config, f"the config of the VAE {name}")
    kind.check(name)
    return class_name, kind
