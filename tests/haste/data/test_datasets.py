import pytest
from haste.data import load_dataset
from haste.errors import UserError


def test_digits_by_name():
    dataset = load_dataset("digits", 8)
    assert (len(dataset), dataset.channels, dataset.resolution, dataset.num_classes) == (1797, 1, 8, 10)


def test_unknown_data_is_refused_with_the_known_names():
    with pytest.raises(UserError, match="--data-dir is 'nothing'; it must be a folder, a zip, or one of: digits"):
        load_dataset("nothing", 8)
