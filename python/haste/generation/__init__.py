"""From a checkpoint to images: the settings (config), the model (loaded), what images are of (conditions), batches
of them (pipeline), folders of them (sample_dir)."""

from haste.errors import lazily

__all__ = ["LoadedCheckpoint", "Sampler", "SamplingConfig", "load_checkpoint", "sample"]
# Of these only the settings do without torch.
__getattr__ = lazily(
    __name__,
    {
        "LoadedCheckpoint": "loaded",
        "Sampler": "pipeline",
        "SamplingConfig": "config",
        "load_checkpoint": "loaded",
        "sample": "sample_dir",
    },
)
