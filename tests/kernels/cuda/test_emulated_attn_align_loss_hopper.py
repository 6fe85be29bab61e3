"""attn_align_loss on compute capability 9.0, emulated: the kernels on TMA and wgmma, and when they are chosen."""

from __future__ import annotations

import pytest
import torch
from attn_align_problems import backward, check, forward, operands, problem

TYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def hopper(emulator):
    return emulator.on(major=9, minor=0)


def served_by_hopper(emulator, tensors):
    """Whether a device of 9.0 gives other bits than one of 8.6: the two paths add in another order."""
    ours, portable = (forward(device, tensors) for device in (emulator.on(major=9, minor=0), emulator))
    return not all(torch.equal(a, b) for a, b in zip(ours, portable, strict=True))


# One tile and less, just more, and, from 129 to 256, the kernel of both gradients at once.
@pytest.mark.parametrize("tokens", (1, 17, 63, 64, 65, 129))
@pytest.mark.parametrize("dtype", TYPES)
def test_any_number_of_tokens(hopper, dtype, tokens):
    check(hopper, operands(dtype, heads=(1, 1), tokens=tokens), seed=tokens)


@pytest.mark.parametrize("tokens", (255, 256, 257, 300))
def test_more_tokens_than_a_block_holds(hopper, tokens):
    check(hopper, operands(torch.bfloat16, heads=(1, 1), tokens=tokens), seed=tokens)


@pytest.mark.parametrize("tokens", (20, 130))
def test_blocks_that_take_several_pieces_of_work(hopper, tokens):
    """More (batch, head)s than multiprocessors: rings and barriers go on where the piece before left them."""
    check(hopper, operands(torch.float16, batch=2, heads=(2, 2), tokens=tokens, dims=(40, 16)), seed=tokens)


@pytest.mark.parametrize("dims", ((8, 32), (64, 64), (64, 72), (80, 40), (96, 128), (128, 64)))
def test_any_head_dims(hopper, dims):
    check(hopper, operands(torch.float16, heads=(1, 1), tokens=70, dims=dims), seed=1)


@pytest.mark.parametrize("tokens", (65, 130))
def test_near_convergence(hopper, tokens):
    """The student within 1 % of its teacher: the gradient is a small difference of two maps."""
    q, k, noise_q, noise_k = operands(torch.float32, heads=(1, 1), dims=(64, 64), tokens=tokens)
    student = [(q + 0.01 * noise_q).half(), (k + 0.01 * noise_k).half()]
    check(hopper, [*student, q.half(), k.half()])


@pytest.mark.parametrize("scales", ((-0.3, 0.5), (0.0, -0.2), (9.0, -15.0), (300.0, 200.0)))
def test_scales(hopper, scales):
    """Of either sign, none at all, and logits beyond a plain exponential; two of three student heads take part."""
    check(hopper, operands(torch.bfloat16, heads=(3, 2), tokens=40, dims=(40, 24)), torch.ones(1, 2, 40), scales)


@pytest.mark.parametrize("size", (2.0**40, 2.0**63, 2.0**127))
def test_logits_beyond_float_give_no_nan(hopper, size):
    """Where all products have one sign, so that no sum of them is ∞ − ∞; equal keys share a row's attention."""
    tensors = [torch.full((1, 1, 20, 16), size, dtype=torch.bfloat16) for _ in range(4)]
    assert torch.allclose(forward(hopper, tensors)[0], torch.tensor(20.0).log())
    gradients = backward(hopper, tensors, torch.full((1, 1, 20), 1e-30))
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_not_a_number_stays_one(hopper):
    tensors = operands(torch.bfloat16, tokens=70)
    tensors[0][0, 0, 3, 5] = tensors[2][0, 1, 66, 0] = float("nan")
    lost = torch.zeros(1, 2, 70, dtype=torch.bool)
    lost[0, 0, 3] = lost[0, 1, 66] = True
    assert torch.equal(forward(hopper, tensors)[0].isnan(), lost)


def test_teacher_behind_its_class_token(emulator, hopper):
    """Operands that begin one token into their memory, in a head and a batch among others."""
    tensors = operands(torch.float16, batch=2, tokens=41, dims=(64, 64))
    tensors = [x[:, :, 1:] for x in tensors]
    assert served_by_hopper(emulator, tensors)
    check(hopper, tensors)


@pytest.mark.parametrize("tokens", (70, 130))
@pytest.mark.parametrize("expanded", (True, False))
def test_upstream_of_every_row(hopper, expanded, tokens):
    """Rows of very different, and of no, weight; or one number per (batch, head), expanded."""
    tensors = operands(torch.float16, batch=2, heads=(1, 1), tokens=tokens, dims=(32, 40))
    upstream = torch.randn(2, 1, tokens, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 0, tokens)
    upstream[:, :, ::7] = 0
    one_number = upstream[:, :, 3:4].expand_as(upstream)
    check(hopper, tensors, one_number if expanded else (upstream.mT.contiguous() * 1e-3).mT)


@pytest.mark.parametrize("tokens", (70, 130))
def test_the_same_bits_whatever_the_order(hopper, tokens):
    """Of threads, copies and products."""
    tensors = operands(torch.float16, heads=(1, 1), tokens=tokens, dims=(64, 64))
    upstream = torch.rand(1, 1, tokens, generator=torch.Generator().manual_seed(2))
    expected = backward(hopper, tensors, upstream)
    for seed in (1, 2, 3):
        again = backward(hopper, tensors, upstream, seed=seed)
        assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wanted", ("grad_q", "grad_k"))
def test_only_the_wanted_gradient(hopper, wanted):
    """More tokens than 128 take another kernel where both are wanted; what it gives is the same up to a rounding."""
    tensors = operands(torch.float16, heads=(1, 1), tokens=130, dims=(64, 64))
    upstream = torch.rand(1, 1, 130, generator=torch.Generator().manual_seed(2))
    alone = backward(hopper, tensors, upstream, wanted=(wanted,))
    assert set(alone) == {wanted}
    torch.testing.assert_close(alone[wanted], backward(hopper, tensors, upstream)[wanted], rtol=2**-9, atol=1e-4)


@pytest.mark.parametrize(("tokens", "offset"), ((70, 0), (70, 1), (130, 0)))
def test_gradients_go_where_they_are_told(hopper, tokens, offset):
    """Into views of one packed tensor, aligned or not; its other elements stay as they were."""
    tensors = operands(torch.bfloat16, tokens=tokens, dims=(40, 24))
    upstream = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(3))
    room = torch.full((tokens * 3 * 2 * 40 + offset,), 7.0, dtype=torch.bfloat16)
    packed = room[offset:].view(1, tokens, 3, 2, 40).permute(2, 0, 3, 1, 4)
    views = {"grad_q": packed[0], "grad_k": packed[1]}
    written = backward(hopper, tensors, upstream, destinations=views)
    expected = backward(hopper, tensors, upstream)
    for name in views:
        assert torch.equal(written[name], expected[name])
    everything = written["grad_q"].as_strided(room.shape, (1,), 0)[offset:].view(1, tokens, 3, 2, 40)
    assert (everything[:, :, 1:] == 7).all()


def test_what_the_copy_engine_cannot_read_goes_to_the_portable_kernels(emulator):
    aligned = operands(torch.float16, tokens=40, dims=(64, 64))
    assert served_by_hopper(emulator, aligned)
    assert not served_by_hopper(emulator, [x.float() for x in aligned])
    assert not served_by_hopper(emulator, [x[..., 1:] for x in aligned])  # begins 2 bytes off
    assert not served_by_hopper(emulator, [x[:, :1].expand(-1, 2, -1, -1) for x in aligned])  # heads in one place


def test_a_path_that_is_asked_for(emulator, hopper, monkeypatch):
    tensors = operands(torch.float16, tokens=40)
    monkeypatch.setenv("HASTE_CUDA_PATH", "portable")
    assert not served_by_hopper(emulator, tensors)
    monkeypatch.setenv("HASTE_CUDA_PATH", "hopper")
    forward(hopper, tensors)
    with pytest.raises(emulator.Refused, match="'hopper' was asked for, and .* not of compute capability 9.0"):
        forward(emulator, tensors)
    monkeypatch.setenv("HASTE_CUDA_PATH", "ampere")
    with pytest.raises(emulator.Refused, match="HASTE_CUDA_PATH is 'ampere'; it must be one .*: portable, hopper"):
        forward(hopper, tensors)


@pytest.mark.parametrize("capability", ((8, 9), (10, 0), (12, 0)))
def test_other_devices_take_the_portable_kernels(emulator, capability):
    tensors = operands(torch.float16, tokens=40)
    device = emulator.on(major=capability[0], minor=capability[1])
    assert torch.equal(forward(device, tensors)[0], forward(emulator, tensors)[0])


def test_nothing_to_do(hopper):
    tensors = operands(torch.float16, batch=0)
    assert problem(tensors)["batch"] == 0
    assert forward(hopper, tensors)[0].shape == (0, 2, 17)
