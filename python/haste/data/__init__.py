"""Training data: pictures with labels, and the order in which they come."""

from haste.data.datasets import DATASETS, ImageDataset, load_dataset
from haste.data.digits import load_digits
from haste.data.order import BatchOrder

__all__ = ["DATASETS", "BatchOrder", "ImageDataset", "load_dataset", "load_digits"]
