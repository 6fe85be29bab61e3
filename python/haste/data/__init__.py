"""Training data: images with labels, in memory or on disk, and the order of batches."""

from haste.errors import BadFile, lazily

__all__ = ["BadFile", "Batch", "BatchOrder", "Loader", "TrainingData", "batches", "load_dataset"]
# Imported when first used, as most need torch.
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
