"""attn_align_loss on compute capability 9.0, emulated: the kernels on TMA and wgmma, and when they are chosen."""

from __future__ import annotations

import pytest
import torch
from attn_align_problems import (
    backward,
    check,
    check_infinite_operand,
    forward,
    operands,
    operands_types_and_losses,
    problem,
)

TYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def hopper(emulator):
    return emulator.on(major=9, minor=0)


def served_by_hopper(emulator, tensors, **loss):
    """Whether a device of 9.0 gives other bits than one of 8.6: the two paths add in another order."""
    ours, portable = (forward(device, tensors, **loss) for device in (emulator.on(major=9, minor=0), emulator))
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
def test_blocks_that_take_several_work_tiles(hopper, tokens):
    """More (batch, head)s than multiprocessors: rings and barriers go on where the work tile before left them."""
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


def divergence(tensors, scale):
    student_q, student_k, teacher_q, teacher_k = (x.double() for x in tensors)
    s, t = ((q @ k.mT * scale).log_softmax(-1) for q, k in ((student_q, student_k), (teacher_q, teacher_k)))
    return (t.exp() * (t - s)).sum(-1)


@pytest.mark.parametrize("scales", (None, (-0.3, 0.5)))
@pytest.mark.parametrize("tokens", (1, 40, 64, 130))
@pytest.mark.parametrize("dtype", TYPES)
def test_divergence(hopper, dtype, tokens, scales):
    check(hopper, operands(dtype, heads=(1, 1), tokens=tokens), scales=scales, divergence="kl")


@pytest.mark.parametrize("tokens", (64, 130))
def test_divergence_of_a_converged_student(hopper, tokens):
    """Exactly 0 where it is its teacher, and of the size of its terms' rounding where it nearly is."""
    q, k, noise_q, noise_k = operands(torch.float32, heads=(1, 1), dims=(64, 64), tokens=tokens)
    teacher = [q.bfloat16(), k.bfloat16()]
    assert (forward(hopper, [*teacher, *teacher], divergence="kl")[0] == 0).all()
    student = [(q + 0.01 * noise_q).bfloat16(), (k + 0.01 * noise_k).bfloat16()]
    loss = forward(hopper, [*student, *teacher], divergence="kl")[0]
    exact = divergence([*student, *teacher], 0.125)
    assert 0 < exact.max() < 1e-2
    assert (loss - exact).abs().max() < 1e-6


@pytest.mark.parametrize("size", (2.0**40, 2.0**63, 2.0**127))
def test_divergence_of_logits_beyond_float(hopper, size):
    tensors = [torch.full((1, 1, 66, 16), size, dtype=torch.bfloat16) for _ in range(4)]
    assert (forward(hopper, tensors, divergence="kl")[0] == 0).all()


@pytest.mark.parametrize("kind", ("cross_entropy", "kl"))
def test_products_of_minus_infinity(hopper, kind):
    """Of some keys, in full tiles: they have no part in any softmax, and their infinite distance none in the loss."""
    tensors = operands(torch.bfloat16, heads=(1, 1), tokens=70, dims=(16, 16))
    for q, k in (tensors[:2], tensors[2:]):
        q[..., 0], k[..., 0] = 2.0**100, 0
        k[..., 3::5, 0] = -(2.0**100)
    kept = torch.arange(70) % 5 != 3
    loss = forward(hopper, tensors, divergence=kind)[0]
    for k in (1, 3):
        tensors[k] = tensors[k][..., kept, :]
    teacher = (tensors[2].double() @ tensors[3].double().mT / 4).log_softmax(-1)
    entropy = -(teacher.exp() * teacher).sum(-1)
    expected = divergence(tensors, 0.25) + (entropy if kind == "cross_entropy" else 0)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operand", "dtype", "kind"), operands_types_and_losses(TYPES))
def test_an_infinite_operand_shows(hopper, operand, dtype, kind):
    """In the first, a middle and the last token, of either sign; operands are numbered as in NAMES."""
    tensors = operands(dtype, heads=(4, 4), tokens=70, dims=(24, 16))
    check_infinite_operand(hopper, tensors, operand, {0: torch.inf, 33: -torch.inf, 69: torch.inf}, divergence=kind)


def test_beside_an_infinite_query_products_beyond_float_stay_finite(hopper):
    tensors = [torch.full((1, 1, 20, 16), 2.0**80, dtype=torch.bfloat16) for _ in range(4)]
    tensors[2][0, 0, 7, 3] = torch.inf
    loss = forward(hopper, tensors)[0]
    others = torch.arange(20) != 7
    assert loss[0, 0, 7].isnan() and torch.allclose(loss[..., others], torch.tensor(20.0).log())


def test_not_a_number_stays_one(hopper):
    tensors = operands(torch.bfloat16, tokens=70)
    tensors[0][0, 0, 3, 5] = tensors[2][0, 1, 66, 0] = float("nan")
    lost = torch.zeros(1, 2, 70, dtype=torch.bool)
    lost[0, 0, 3] = lost[0, 1, 66] = True
    assert torch.equal(forward(hopper, tensors)[0].isnan(), lost)


@pytest.mark.parametrize(("tokens", "heads"), ((70, 12), (130, 4)))
def test_not_a_number_reaches_every_gradient_that_depends_on_it(hopper, tokens, heads):
    """In the last head; those before it leave numbers where statistics lie, of tiles with larger maxima."""
    tensors = operands(torch.bfloat16, heads=(heads, heads), tokens=tokens, dims=(16, 16))
    tensors[0][0, :-1] *= 60
    tensors[3][0, -1, 2, 5] = float("nan")  # a teacher's key, on which every query's sum depends
    gradients = backward(hopper, tensors, torch.tensor(1.0).expand(1, heads, tokens))
    for gradient in gradients.values():
        assert gradient[0, -1].isnan().all() and not gradient[0, :-1].isnan().any()


def test_teacher_behind_its_class_token(emulator, hopper):
    """Operands that begin one token into their memory, in a head and a batch among others."""
    tensors = operands(torch.float16, batch=2, tokens=41, dims=(64, 64))
    tensors = [x[:, :, 1:] for x in tensors]
    assert served_by_hopper(emulator, tensors)
    check(hopper, tensors)


@pytest.mark.parametrize("tokens", (70, 130))
@pytest.mark.parametrize("expanded", (True, False))
def test_grad_out_of_every_row(hopper, expanded, tokens):
    """Rows of very different, and of no, weight; or one number per (batch, head), expanded."""
    tensors = operands(torch.float16, batch=2, heads=(1, 1), tokens=tokens, dims=(32, 40))
    grad_out = torch.randn(2, 1, tokens, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 0, tokens)
    grad_out[:, :, ::7] = 0
    one_number = grad_out[:, :, 3:4].expand_as(grad_out)
    check(hopper, tensors, one_number if expanded else (grad_out.mT.contiguous() * 1e-3).mT)


def shifted(x, shifts):
    """Operands of whose logits every row is `shifts` higher, by one more column: q (…, N, D), shifts (N,)."""
    q, k = x
    column = shifts.to(q.dtype).expand(q.shape[:-1])[..., None]
    zeros = torch.zeros_like(column).expand(*column.shape[:-1], 7)  # the copy engine takes dims in eights
    return torch.cat([q, column, zeros], -1), torch.cat([k, torch.ones_like(column), zeros], -1)


@pytest.mark.parametrize("tokens", (70, 130))
@pytest.mark.parametrize("shifts", ((100.0, 0.0), (0.0, -100.0), (-35.0, 35.0)))
def test_tiles_of_small_and_of_large_maxima(hopper, shifts, tokens):
    """Of the first tile of queries and of the others; beyond a bound a tile takes the longer way, its neighbour not."""
    q, k, *teacher = operands(torch.float16, heads=(1, 1), tokens=tokens, dims=(40, 24))
    rows = torch.where(torch.arange(tokens) < 64, *shifts)
    check(hopper, [*shifted((q, k), rows), *shifted(teacher, rows)], scales=(0.2, 0.2))


def nearly_converged(tokens, dim, shift, seed=0):
    """A student within 1 % of its teacher whose keys are unit vectors, as far as there are columns, and a shift of all
    logits by a last column: logits are a query's numbers, exactly, and dq / scale its G."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 1, tokens, dim, generator=generator)
    noise = 0.01 * torch.randn(1, 1, tokens, dim, generator=generator)
    k = torch.eye(tokens, dim).expand(1, 1, tokens, dim).clone()
    k[..., -1], q[..., -1], noise[..., -1] = 1, shift, 0
    return [x.half() for x in (q + noise, k, q, k)]


@pytest.mark.parametrize("shift", (-42.0, -20.0, 0.0, 40.0, 200.0))  # 64 powers of 2 are 44.4
@pytest.mark.parametrize(("tokens", "gradient"), ((70, "grad_q"), (70, "grad_k"), (130, "grad_q"), (130, "grad_k")))
def test_error_of_the_difference_near_convergence(hopper, gradient, tokens, shift):
    """Beyond its rounding to fp16 at most 5e-4 of G: by norm, and the largest error by the largest G."""
    dim = 64
    tensors = nearly_converged(tokens, dim, shift)
    if gradient == "grad_k":  # queries and keys change places: then dk / scale is Gᵀ
        tensors = [tensors[i] for i in (1, 0, 3, 2)]
    one = torch.tensor(1.0).expand(1, 1, tokens)
    written = backward(hopper, tensors, one, scales=(1.0, 1.0))[gradient].double()[..., : dim - 1]
    student_q, student_k, teacher_q, teacher_k = (x.double() for x in tensors)
    difference = (student_q @ student_k.mT).softmax(-1) - (teacher_q @ teacher_k.mT).softmax(-1)
    exact = (difference if gradient == "grad_q" else difference.mT)[..., : dim - 1]
    rounding = exact.abs() * 2**-11 + 2**-25
    excess = ((written - exact).abs() - rounding).clamp(min=0)
    assert exact.abs().max() > 1e-4
    error, largest = (excess.norm() / exact.norm()).item(), (excess.max() / exact.abs().max()).item()
    print(f"G of {tokens} tokens, shift {shift}: error {error:.1e}, largest {largest:.1e}")
    assert max(error, largest) <= 5e-4


@pytest.mark.parametrize("tokens", (70, 130))
def test_products_of_72_columns_in_two_instructions(hopper, tokens, monkeypatch):
    """The same bits, on a device that refuses 72 at once."""
    tensors = operands(torch.bfloat16, heads=(1, 1), tokens=tokens)
    grad_out = torch.rand(1, 1, tokens, generator=torch.Generator().manual_seed(2))
    expected = backward(hopper, tensors, grad_out)
    device = hopper.on(whole_panels=1)
    with pytest.raises(hopper.KernelFault, match="columns of a transposed operand that end within its second panel"):
        backward(device, tensors, grad_out)
    monkeypatch.setenv("HASTE_HOPPER_SPLIT_N72", "1")
    split = backward(device, tensors, grad_out)
    assert all(torch.equal(split[name], expected[name]) for name in expected)
    monkeypatch.setenv("HASTE_HOPPER_SPLIT_N72", "yes")
    with pytest.raises(hopper.Refused, match="HASTE_HOPPER_SPLIT_N72 must be 0 or 1"):
        backward(device, tensors, grad_out)


@pytest.mark.parametrize("tokens", (70, 130))
def test_the_same_bits_whatever_the_order(hopper, tokens):
    """Of threads, copies and products."""
    tensors = operands(torch.float16, heads=(1, 1), tokens=tokens, dims=(64, 64))
    grad_out = torch.rand(1, 1, tokens, generator=torch.Generator().manual_seed(2))
    expected = backward(hopper, tensors, grad_out)
    for seed in (1, 2, 3):
        again = backward(hopper, tensors, grad_out, seed=seed)
        assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wanted", ("grad_q", "grad_k"))
def test_only_the_wanted_gradient(hopper, wanted):
    """More tokens than 128 take another kernel where both are wanted; what it gives is the same up to a rounding."""
    tensors = operands(torch.float16, heads=(1, 1), tokens=130, dims=(64, 64))
    grad_out = torch.rand(1, 1, 130, generator=torch.Generator().manual_seed(2))
    alone = backward(hopper, tensors, grad_out, wanted=(wanted,))
    assert set(alone) == {wanted}
    torch.testing.assert_close(alone[wanted], backward(hopper, tensors, grad_out)[wanted], rtol=2**-9, atol=1e-4)


@pytest.mark.parametrize(("tokens", "offset"), ((70, 0), (70, 1), (130, 0)))
def test_gradients_go_where_they_are_told(hopper, tokens, offset):
    """Into views of one packed tensor, aligned or not; its other elements stay as they were."""
    tensors = operands(torch.bfloat16, tokens=tokens, dims=(40, 24))
    grad_out = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(3))
    room = torch.full((tokens * 3 * 2 * 40 + offset,), 7.0, dtype=torch.bfloat16)
    packed = room[offset:].view(1, tokens, 3, 2, 40).permute(2, 0, 3, 1, 4)
    views = {"grad_q": packed[0], "grad_k": packed[1]}
    written = backward(hopper, tensors, grad_out, destinations=views)
    expected = backward(hopper, tensors, grad_out)
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
    assert not served_by_hopper(emulator, aligned, causal=8)


def test_a_set_of_kernels_that_is_asked_for(emulator, hopper, monkeypatch):
    tensors = operands(torch.float16, tokens=40)
    monkeypatch.setenv("HASTE_CUDA_KERNELS", "portable")
    assert not served_by_hopper(emulator, tensors)
    monkeypatch.setenv("HASTE_CUDA_KERNELS", "hopper")
    forward(hopper, tensors)
    with pytest.raises(emulator.Refused, match="'hopper' were asked for, and .* not of compute capability 9.0"):
        forward(emulator, tensors)
    monkeypatch.setenv("HASTE_CUDA_KERNELS", "ampere")
    with pytest.raises(emulator.Refused, match="HASTE_CUDA_KERNELS must be one of portable, hopper"):
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
