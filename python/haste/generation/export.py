"""Writing a trained DiT as the folder of a DiTPipeline of diffusers."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from haste.diffusion import BETA_FIRST, BETA_LAST, NUM_TIMES
from haste.errors import UserError
from haste.generation.loaded import LoadedCheckpoint, latent_format, load_checkpoint
from haste.io import (
    is_free,
    read_json,
    remove_abandoned,
    require_space,
    temporary_path,
    write_atomically,
    write_json,
    writing,
)
from haste.models import Convention
from haste.models.dit_diffusers import to_diffusers
from haste.models.dit_times import NAMES as TIMES
from haste.resumable import differences
from haste.training.checkpoint import checkpoint_identity
from haste.training.pipeline_folder import CONFIG, INDEX, PIPELINE, RECORD, TIMES_FILE, WEIGHTS
from haste.vae import VAE, LatentFormat
from haste.validation import check

logger = logging.getLogger(__name__)

ALONE = "none"  # --vae of a transformer without one


def export_pipeline(
    checkpoint: LoadedCheckpoint | Path | str,
    folder: Path | str,
    *,
    ema: bool | float = True,
    vae: str | None = None,
    fit_times: bool = True,
    convention: Convention | None = None,
) -> Path:
    """Write a DiT as a folder for diffusers' DiTPipeline.from_pretrained.

    The folder appears when it is complete. One that holds this export already stays as it is.

    Args:
        checkpoint: of a DiT: a file, a run folder for its latest readable checkpoint, or what `load_checkpoint`
            returns, whose weights it then is.
        folder: a new one.
        ema: write the EMA weights; a number writes the average of this decay.
        vae: the pipeline's VAE, as in `sample`; "none" writes the transformer and its scheduler alone.
        fit_times: fit the embedding of times to diffusers' frequencies, see `haste.models.dit_times`.
        convention: as of `load_checkpoint`.

    Returns:
        The folder.

    Raises:
        UserError: a model that is no DiT, or that diffusers cannot compute; a model of pixels, which has no VAE; a VAE
            whose weights are not there; a folder with something else.
    """
    target: Path = check(folder, Path, "folder").expanduser()
    if not isinstance(checkpoint, LoadedCheckpoint):
        checkpoint = load_checkpoint(checkpoint, ema, device="cpu", convention=convention)
    _check_family(checkpoint)
    latents = _latents(checkpoint, vae)
    record = {
        **checkpoint_identity(checkpoint.checkpoint),
        "ema": ema,
        "fit_times": fit_times,
        "latents": None if latents is None else {name: _plain(value) for name, value in asdict(latents).items()},
    }
    if _is_there(target, record):
        logger.info("%s holds this pipeline already", target)
        return target
    decoder = None if latents is None else VAE(latents)
    weights = {name: value.detach().cpu() for name, value in checkpoint.model.state_dict().items()}
    theirs, config, fitted = to_diffusers(weights, checkpoint.model_config, fit_times)
    if fitted is not None:
        logger.info("times are embedded with a relative error of at most %.1e at multiples of 10 (runs of 10, 20, 25, "
                    "50 and 100 steps), %.1e at all", fitted.error_of_tens, fitted.error)  # fmt: skip
    if not config["_haste"]["null_class"]:
        logger.warning("the model was trained with --cfg-prob 0 and has no null class: call the pipeline with "
                       "guidance_scale=1, as its guided images are NaN")  # fmt: skip
    names = checkpoint.class_names
    with writing(f"--to {target}"):
        require_space(target.parent, sum(value.nbytes for value in theirs.values()), "the transformer")
        remove_abandoned(target)
        temporary = temporary_path(target)
        try:
            _write_transformer(temporary / "transformer", theirs, config, weights if fitted is not None else None)
            _write_scheduler(temporary / "scheduler")
            if decoder is not None:
                decoder.save(temporary / "vae")
                write_json(temporary / INDEX, _index(names, decoder.class_name))
            write_json(temporary / RECORD, record)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_family(loaded: LoadedCheckpoint) -> None:
    if loaded.family.name != "dit":
        raise UserError(f"--ckpt must be a DiT, for which diffusers has a pipeline, got a {loaded.family.title}: "
                        f"{loaded.checkpoint}")  # fmt: skip


def _latents(loaded: LoadedCheckpoint, vae: str | None) -> LatentFormat | None:
    """The format of the pipeline's latents; None for a transformer alone."""
    if vae is not None and vae.lower() == ALONE:
        return None
    latents = latent_format(loaded, vae)
    if latents is None:
        raise UserError(f"--vae must be none, for the transformer alone, as a {PIPELINE} decodes latents by a VAE, and "
                        f"the model of {loaded.checkpoint} makes pixels")  # fmt: skip
    return latents


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_there(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a folder holds this export. UserError if it holds anything else."""
    if is_free(folder):
        return False
    if not (folder / RECORD).is_file():
        raise UserError(f"--to must be a new folder, got {folder}, which holds something else")
    found = differences(read_json(folder / RECORD, "the record of an export"), record)
    if found:
        raise UserError(
            f"--to must be another folder, got {folder}, which holds a pipeline with {'; '.join(found[:3])}"
        )
    return True


def _write_transformer(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], before: Mapping[str, Tensor] | None
) -> None:
    """before: the model's weights, of which the embedder of times is kept as it was before it was fitted."""
    write_json(folder / CONFIG, {**config, "_diffusers_version": _diffusers_version()})
    _save(folder / WEIGHTS[0], weights)
    if before is not None:
        _save(folder / TIMES_FILE, {name: before[name] for name in TIMES})


def _save(path: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    contiguous = {name: value.contiguous() for name, value in weights.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def _write_scheduler(folder: Path) -> None:
    """DDIM with DiT's β. Leading times, as of the published pipelines: diffusers' DDIM steps right only where times
    are evenly apart."""
    from diffusers import DDIMScheduler

    DDIMScheduler(
        num_train_timesteps=NUM_TIMES,
        beta_start=BETA_FIRST,
        beta_end=BETA_LAST,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="leading",
    ).save_pretrained(folder)


def _index(class_names: Any, vae: str) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "_diffusers_version": _diffusers_version(),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", vae],
    }
    if class_names:
        index["id2label"] = {str(label): name for label, name in enumerate(class_names)}
    return index


def _diffusers_version() -> str:
    from diffusers import __version__

    return __version__
