"""From a checkpoint to images: the settings (config), batches of images (pipeline), folders of them (sample_dir)."""

from haste.errors import lazily

__all__ = ["LoadedCheckpoint", "Sampler", "SamplingConfig", "load_checkpoint", "sample"]
# Of these only the settings do without torch.
__getattr__ = lazily(
    __name__,
    {
        "LoadedCheckpoint": "checkpoint",
        "Sampler": "pipeline",
        "SamplingConfig": "config",
        "load_checkpoint": "checkpoint",
        "sample": "sample_dir",
    },
)
