"""Training data: images with labels, from memory or from disk, and the order in which they come."""

from haste.errors import BadFile, lazily

__all__ = ["BadFile", "Batch", "BatchOrder", "Loader", "TrainingData", "batches", "load_dataset"]
# All that brings torch.
__getattr__ = lazily(
    __name__,
    {
        "Batch": "dataset",
        "BatchOrder": "loader",
        "Loader": "loader",
        "TrainingData": "dataset",
        "batches": "loader",
        "load_dataset": "load",
    },
)
