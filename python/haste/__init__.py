"""haste: diffusion transformers that train faster (HASTE, REPA) and sample faster (feature caching).

    haste.train(haste.TrainConfig(...))               train, or resume a run
    haste.load_checkpoint(path)                       the model behind a checkpoint, with what it records
    haste.sample(path, labels=[1, 7])                 images (N, H, W, 3) uint8
    haste.evaluate(images, "digits", "digits")        FD, KID, PRDC and others of images against a reference
    haste.cached(pipe)                                forecast most steps of a pipeline of diffusers, in a with block
    haste.enable_cache(model, num_steps=50)           the same in a loop of one's own; haste.disable_cache undoes it

and the pieces, for a trainer or a sampler of one's own:

    haste.Aligner      the teachers by name, and REPA's and HASTE's losses on any queries, keys and features
    haste.alignment.termination   when alignment ends
    haste.transport    the paths between data and noise, the velocity loss
    haste.samplers     Euler, Heun and Euler–Maruyama samplers with guidance
    haste.caching      schedules, forecasts and what of a model they cache
    haste.models       the model families, and the registry for more
    haste.teachers     frozen image encoders
    haste.data         training data from memory, folders, zips and latents

Importing `haste` imports nothing heavy: each name is imported when it is first used. The fused operations underneath
are a package of their own, `haste_ext`.
"""

from typing import TYPE_CHECKING

from haste.errors import UserError, lazily

if TYPE_CHECKING:
    from haste.alignment.aligner import Aligner, LayerMap
    from haste.caching.config import CacheConfig
    from haste.caching.enable import cached, disable_cache, enable_cache
    from haste.evaluation.evaluate import evaluate
    from haste.generation.config import SamplingConfig
    from haste.generation.export import export_pipeline
    from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
    from haste.generation.sample_dir import sample
    from haste.training.config import TrainConfig
    from haste.training.trainer import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "CacheConfig",
    "LayerMap",
    "LoadedCheckpoint",
    "SamplingConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "cached",
    "disable_cache",
    "enable_cache",
    "evaluate",
    "export_pipeline",
    "load_checkpoint",
    "sample",
    "train",
]

__getattr__ = lazily(
    __name__,
    {
        "Aligner": "alignment.aligner",
        "CacheConfig": "caching.config",
        "LayerMap": "alignment.aligner",
        "LoadedCheckpoint": "generation.loaded",
        "SamplingConfig": "generation.config",
        "TrainConfig": "training.config",
        "TrainResult": "training.trainer",
        "cached": "caching.enable",
        "disable_cache": "caching.enable",
        "enable_cache": "caching.enable",
        "evaluate": "evaluation.evaluate",
        "export_pipeline": "generation.export",
        "load_checkpoint": "generation.loaded",
        "sample": "generation.sample_dir",
        "train": "training.trainer",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
