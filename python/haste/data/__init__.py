"""Training data: pictures with labels, from memory or from disk, and the order in which they come."""

from haste.data.bad_files import BadFile
from haste.data.datasets import load_dataset
from haste.data.digits import load_digits
from haste.data.loader import batches
from haste.data.order import BatchOrder
from haste.data.training_data import Batch, TrainingData

__all__ = ["BadFile", "Batch", "BatchOrder", "TrainingData", "batches", "load_dataset", "load_digits"]
