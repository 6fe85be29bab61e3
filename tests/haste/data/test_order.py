import pytest
import torch
from haste.data import BatchOrder
from hypothesis import given
from hypothesis import strategies as st


@given(samples=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_image_once(samples, batch, seed):
    order = BatchOrder(samples, batch, seed)
    stream = torch.cat([order.batch(step) for step in range(3 * samples // batch + 1)])
    for epoch in range(len(stream) // samples):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))


def test_a_batch_depends_on_its_step_alone():
    order = BatchOrder(50, 16, seed=3)
    walked = [order.batch(step) for step in range(12)]
    for step in (11, 0, 5):
        assert torch.equal(BatchOrder(50, 16, seed=3).batch(step), walked[step])


def test_epochs_and_seeds_differ():
    order = BatchOrder(100, 100, seed=0)
    assert not torch.equal(order.batch(0), order.batch(1))
    assert not torch.equal(order.batch(0), BatchOrder(100, 100, seed=1).batch(0))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    BatchOrder(10, 4, seed=0).batch(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="num_samples is 0"):
        BatchOrder(0, 4, seed=0)
