"""Training data: pictures with labels, from memory or from disk, and the order in which they come."""

from haste.data.bad_files import BadFile
from haste.lazily import lazily

__all__ = ["BadFile", "Batch", "BatchOrder", "TrainingData", "batches", "load_dataset", "load_digits"]
# All that brings torch.
__getattr__ = lazily(
    __name__,
    {
        "Batch": "training_data",
        "BatchOrder": "order",
        "TrainingData": "training_data",
        "batches": "loader",
        "load_dataset": "datasets",
        "load_digits": "digits",
    },
)
