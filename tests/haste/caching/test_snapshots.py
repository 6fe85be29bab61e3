"""The ring: what it keeps, where, for which branch, and that an unused slot has no weight."""

from __future__ import annotations

import torch
from haste.caching.forecaster import Place, SnapshotRing

BOTH = ("label", "null")


def filled(positions: list[int], slots: int = 3) -> SnapshotRing:
    """Two modules, one row per branch; the feature at position p is p for "label" and p + 0.5 for "null"."""
    ring = SnapshotRing(modules=2, slots=slots)
    ring.require(2, 3, 4, torch.float32, torch.device("cpu"))
    for position in positions:
        write(ring, position, BOTH)
    return ring


def write(ring: SnapshotRing, position: int, branches: tuple[str, ...], offset: float = 0.0) -> None:
    slot = ring.open(Place(position, 1 - position / 100), branches)
    for row, branch in enumerate(BOTH):
        if branch in branches:
            ring.storage[:, slot, row] = position + row / 2 + offset


def kept(ring: SnapshotRing, branch: str) -> list[float]:
    """The features behind a branch's places, newest first, found by weights of 1."""
    unit = torch.eye(len(ring.places(branch))).tolist()
    slots = [ring.by_slot(weights, branch).index(1.0) for weights in unit]
    return [ring.storage[1, slot, BOTH.index(branch), 0, 0].item() for slot in slots]


def positions(ring: SnapshotRing, branch: str) -> list[float]:
    return [place.position for place in ring.places(branch)]


def test_it_keeps_the_newest_and_overwrites_the_oldest_in_place():
    ring = filled([0, 1, 5])
    storage = ring.storage.data_ptr()
    assert positions(ring, "label") == [5, 1, 0] and kept(ring, "label") == [5, 1, 0]
    for position in (9, 13):
        write(ring, position, BOTH)
    assert positions(ring, "label") == [13, 9, 5] and kept(ring, "label") == [13, 9, 5]
    assert ring.storage.data_ptr() == storage and ring.storage.shape == (2, 3, 2, 3, 4)
    assert ring.bytes == 2 * 3 * 2 * 3 * 4 * 4


def test_a_second_snapshot_at_one_position_takes_the_place_of_the_first():
    ring = filled([0, 1])
    write(ring, 1, BOTH, offset=6.0)
    assert positions(ring, "null") == [1, 0] and kept(ring, "null") == [7.5, 0.5]


def test_branches_that_come_one_after_the_other_share_a_slot():
    ring = filled([])
    for position in (0, 1, 5, 9):
        write(ring, position, ("label",))
        write(ring, position, ("null",))
    assert kept(ring, "label") == [9, 5, 1] and kept(ring, "null") == [9.5, 5.5, 1.5]


def test_a_branch_that_sits_out_keeps_its_own_until_they_are_overwritten():
    ring = filled([0, 1])
    write(ring, 5, ("label",))
    assert kept(ring, "label") == [5, 1, 0] and kept(ring, "null") == [1.5, 0.5]
    write(ring, 9, ("label",))
    write(ring, 13, ("label",))
    assert kept(ring, "label") == [13, 9, 5] and ring.places("null") == []


def test_slots_that_do_not_hold_a_branch_have_weight_zero():
    ring = filled([0, 1], slots=5)
    write(ring, 5, ("label",))
    assert ring.by_slot([2.0, -1.0, 4.0], "label") == [4, -1, 2, 0, 0]
    assert ring.by_slot([2.0, -1.0], "null") == [-1, 2, 0, 0, 0]


def test_other_rows_or_another_type_begin_anew_and_a_run_keeps_the_memory():
    ring = filled([0])
    cpu, storage = torch.device("cpu"), ring.storage.data_ptr()
    ring.require(2, 3, 4, torch.float32, cpu)
    assert positions(ring, "label") == [0]
    ring.clear()
    assert ring.places("label") == [] and ring.storage.data_ptr() == storage
    write(ring, 3, BOTH)
    ring.require(4, 3, 4, torch.float32, cpu)
    assert ring.places("label") == [] and ring.storage.shape[2] == 4
    write(ring, 4, BOTH)
    ring.require(4, 3, 4, torch.bfloat16, cpu)
    assert ring.places("label") == [] and ring.storage.dtype == torch.bfloat16
    ring.release()
    assert ring.storage is None and ring.bytes == 0
