"""The ring: what it keeps, where, and that an unused slot has no weight."""

from __future__ import annotations

import torch
from haste.caching.snapshots import SnapshotRing


def filled(positions: list[int], slots: int = 3) -> SnapshotRing:
    """Two modules; the feature of module m at position p is p + m / 10 everywhere."""
    ring = SnapshotRing(modules=2, slots=slots)
    for position in positions:
        ring.open(position)
        for module in range(2):
            ring.write(module, torch.full((1, 2, 4), position + module / 10))
    return ring


def kept(ring: SnapshotRing, module: int) -> list[float]:
    """The features behind the positions, newest first, found by weights of 1."""
    unit = torch.eye(len(ring.positions)).tolist()
    slots = [ring.by_slot(weights).argmax().item() for weights in unit]
    return [ring.storage[module, slot, 0, 0, 0].item() for slot in slots]


def test_it_keeps_the_newest_and_overwrites_the_oldest_in_place():
    ring = filled([0, 1, 5])
    storage = ring.storage.data_ptr()
    assert ring.positions == [5, 1, 0] and kept(ring, 0) == [5, 1, 0]
    for position in (9, 13):
        ring.open(position)
        ring.write(0, torch.full((1, 2, 4), float(position)))
    assert ring.positions == [13, 9, 5] and kept(ring, 0) == [13, 9, 5]
    assert ring.storage.data_ptr() == storage and ring.storage.shape == (2, 3, 1, 2, 4)


def test_modules_are_apart():
    torch.testing.assert_close(torch.tensor(kept(filled([0, 1, 5]), 1)), torch.tensor([5.1, 1.1, 0.1]))


def test_a_second_snapshot_at_one_position_takes_the_place_of_the_first():
    ring = filled([0, 1])
    ring.open(1)
    ring.write(0, torch.full((1, 2, 4), 7.0))
    assert ring.positions == [1, 0] and kept(ring, 0) == [7, 0]


def test_slots_not_in_use_have_weight_zero():
    weights = filled([0, 1], slots=5).by_slot([2.0, -1.0])
    assert weights.tolist() == [-1, 2, 0, 0, 0] and weights.dtype == torch.float32


def test_fits_and_clear():
    ring = SnapshotRing(modules=2, slots=3)
    assert not ring.fits(torch.zeros(1, 2, 4))
    ring = filled([0])
    assert ring.fits(torch.zeros(1, 2, 4)) and not ring.fits(torch.zeros(2, 2, 4))
    ring.clear()
    assert ring.storage is None and ring.positions == []
