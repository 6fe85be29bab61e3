"""From a checkpoint to images: the settings (config), batches of images (pipeline), folders of them (sample_dir)."""

from haste.errors import lazily

__all__ = ["LoadedCheckpoint", "Sampler", "SamplingConfig", "load_checkpoint", "sample"]
# Of these only the settings do without torch.
__getattr__ = lazily(
    __name__,
    {
        "LoadedCheckpoint": "pipeline",
        "Sampler": "pipeline",
        "SamplingConfig": "config",
        "load_checkpoint": "pipeline",
        "sample": "sample_dir",
    },
)
