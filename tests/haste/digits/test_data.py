import torch
from haste.digits import load_digits
from sklearn import datasets


def test_the_digits_are_scikit_learns_between_minus_one_and_one():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    source = datasets.load_digits()
    assert ((images[7, 0] + 1) * 8).tolist() == source.images[7].tolist()
    assert labels.tolist() == source.target.tolist()
