"""The emulated primitives of compute capability 9.0: against plain indexing and float64, and in kernels at fault."""

from __future__ import annotations

import pytest
import torch

HOPPER = {"major": 9, "minor": 0}
TYPES = (torch.float16, torch.bfloat16)
COLUMNS = 64  # of a panel


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swizzled(rows):
    """A panel as it lies in memory: chunk c of 8 columns of row r lies where chunk c ^ (r % 8) would."""
    count = rows.shape[0]
    chunks = rows.reshape(count, 8, 8)
    places = torch.arange(8) ^ (torch.arange(count) % 8)[:, None]
    return torch.zeros_like(chunks).scatter_(1, places[..., None].expand_as(chunks), chunks).reshape(count, COLUMNS)


# --- the copy engine ---


def packed_projection(dtype):
    """q of a packed (B, N, 3, H, D) projection without its first two tokens: heads lie closer than tokens."""
    return random(2, 70, 3, 3, 72, dtype=dtype).permute(2, 0, 3, 1, 4)[0][:, :, 2:]


def load_panel(emulator, operand, rows, column=0, token=0, head=0, sample=0, seed=0):
    batch, heads, tokens, dim = operand.shape
    sizes = {"batch": batch, "heads": heads, "tokens": tokens, "dim": dim, "type": operand.dtype}
    where = {"rows": rows, "column": column, "token": token, "head": head, "sample": sample}
    tensors = {"operand": operand, "panel": torch.full((rows, COLUMNS), float("nan"), dtype=operand.dtype)}
    return emulator("panel", tensors, ("panel",), seed, **sizes, **where, **HOPPER)["panel"]


def expected_panel(operand, rows, column=0, token=0, head=0, sample=0):
    part = operand[sample, head, token : token + rows, column : column + COLUMNS]
    panel = torch.zeros(rows, COLUMNS, dtype=operand.dtype)
    panel[: part.shape[0], : part.shape[1]] = part
    return swizzled(panel)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "where",
    (
        {"rows": 64},
        {"rows": 64, "head": 2, "sample": 1},
        {"rows": 64, "column": 64, "sample": 1},  # 8 columns, and 56 outside
        {"rows": 64, "token": 64, "head": 1},  # 4 tokens, and 60 outside
        {"rows": 8, "token": 3},
        {"rows": 256},  # more than there are
        {"rows": 16, "token": 68},  # all outside
    ),
    ids=str,
)
def test_a_panel_is_swizzled_and_zero_outside(emulator, dtype, where):
    operand = packed_projection(dtype)
    assert torch.equal(load_panel(emulator, operand, **where), expected_panel(operand, **where))


def test_a_panel_wider_than_the_tensor(emulator):
    operand = random(1, 1, 5, 20).new_zeros(1, 1, 5, 24).normal_()[..., :20]
    assert torch.equal(load_panel(emulator, operand, 8), expected_panel(operand, 8))


def test_strides_of_single_elements_do_not_matter(emulator):
    operand = random(9 * 33)[: 9 * 32].as_strided((1, 1, 9, 32), (7, 5, 32, 1))
    assert torch.equal(load_panel(emulator, operand, 16), expected_panel(operand, 16))


@pytest.mark.parametrize(
    "operand",
    (
        random(1, 2, 9, 20),  # rows of 40 bytes
        random(1, 1, 9 * 32 + 1).flatten()[1:].view(1, 1, 9, 32),  # begins 2 bytes behind a multiple of 16
        random(1, 2, 9, 32).float(),
        random(1, 1, 9, 32).expand(1, 2, 9, 32),  # a stride of 0
        random(1, 1, 1, 96).unfold(3, 32, 8)[:, :, 0],  # a window that moves on by 8
    ),
    ids=("stride", "address", "type", "expanded", "overlapping"),
)
def test_what_the_copy_engine_cannot_read(emulator, operand):
    with pytest.raises(emulator.Refused, match="the copy engine cannot read the operand"):
        load_panel(emulator, operand, 8)


def test_the_driver_refuses_a_panel_of_too_many_rows(emulator):
    with pytest.raises(emulator.Refused, match="the CUDA driver refused to describe an operand"):
        load_panel(emulator, random(1, 1, 9, 32), 264)


# --- products ---


def multiply(emulator, a, b, transpose_a=False, transpose_b=False, a_from="copy engine", seed=0):
    """a (64, depth) times b (depth, columns)."""
    tensors = {
        "a": (a.T if transpose_a else a).contiguous(),
        "b": (b if transpose_b else b.T).contiguous(),
        "c": torch.full((64, b.shape[1]), float("nan")),
    }
    values = {"columns": b.shape[1], "depth": b.shape[0], "type": a.dtype, "a_from": a_from}
    values |= {"transpose_a": int(transpose_a), "transpose_b": int(transpose_b)}
    return emulator("product", tensors, ("c",), seed, **values, **HOPPER)["c"]


def check_product(emulator, dtype, depth, columns, **variant):
    a, b = random(64, depth, dtype=dtype), random(depth, columns, dtype=dtype, seed=1)
    product = multiply(emulator, a, b, **variant)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("columns", range(8, 129, 8))
@pytest.mark.parametrize("transpose_b", (False, True))
def test_every_number_of_columns(emulator, columns, transpose_b):
    dtype = TYPES[columns // 8 % 2]
    check_product(emulator, dtype, 32, columns, transpose_b=transpose_b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("a_from", ("copy engine", "registers", "stored"))
@pytest.mark.parametrize("transpose_a", (False, True))
@pytest.mark.parametrize("transpose_b", (False, True))
def test_every_kind_of_operand(emulator, dtype, a_from, transpose_a, transpose_b):
    """Contractions over more than one panel; B of more than one panel where it is transposed."""
    for depth, columns, seed in ((80, 72, 0), (128, 128, 1), (16, 8, 2)):
        variant = {"a_from": a_from, "transpose_a": transpose_a, "transpose_b": transpose_b, "seed": seed}
        check_product(emulator, dtype, depth, columns, **variant)


@pytest.mark.parametrize(
    ("a_from", "message"),
    (
        ("stored without fence", "wgmma reads what a thread stored without fence_shared_for_async"),
        ("changing registers", "the A registers of a wgmma changed before it was waited for"),
    ),
)
def test_a_fault_of_a_product_ends_the_process_in_some_order(emulator, a_from, message):
    with pytest.raises(emulator.KernelFault, match=message):
        for seed in range(10):
            multiply(emulator, random(64, 16), random(16, 8), a_from=a_from, seed=seed)


# --- a ring of stages ---


def ring(emulator, fault="none", seed=0, tokens=250):
    a, b = random(64, 64), random(tokens, 64, seed=1)
    tensors = {"a": a, "b": b, "c": torch.full((64, 64), float("nan"))}
    product = emulator("ring", tensors, ("c",), seed, tokens=tokens, name=fault, **HOPPER)["c"].double()
    tiles = torch.nn.functional.pad(b.double(), (0, 0, 0, -tokens % 64)).view(-1, 64, 64).sum(0)
    return torch.allclose(product, a.double() @ tiles.T, rtol=1e-5, atol=1e-4)


def test_a_ring(emulator):
    assert all(ring(emulator, seed=seed) for seed in range(10))
    assert all(ring(emulator, tokens=tokens) for tokens in (1, 64, 65, 700))


@pytest.mark.parametrize("fault", ("read before full", "read before wait", "release before wait", "release for others"))
def test_missing_synchronisation_shows_in_the_numbers(emulator, fault):
    """In some order of the threads; not in all, as on a device."""
    assert not all(ring(emulator, fault, seed, 700) for seed in range(10))


@pytest.mark.parametrize("fault", ("wrong swizzle", "wrong stride", "wrong major"))
def test_a_wrong_descriptor_shows_in_the_numbers(emulator, fault):
    assert not ring(emulator, fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    (
        ("too many bytes", "waits for a phase of an mbarrier that lacks 0 arrivals and 16 bytes"),
        ("no producer", "waits for a phase of an mbarrier that lacks 1 arrivals and 0 bytes"),
        ("arrives twice", "more threads arrive at a phase of an mbarrier than it expects"),
        ("overwritten", "an mbarrier was overwritten"),
        ("no wgmma_fence", "a group of wgmma begins without wgmma_fence"),
        ("no commit", "a warp ends with wgmma that it has not committed"),
        ("no init fence", "the copy engine is given an mbarrier without barrier_init_fence"),
        ("no init", "an mbarrier is used that was not initialised"),
        ("misaligned", "a panel does not begin at a multiple of 1024 bytes"),
        ("stores unfenced", "the copy engine overwrites what a thread stored without fence_shared_for_async"),
        ("uneven warps", "the warps of a warpgroup issue different wgmma"),
        ("diverged warp", "the block is stuck"),
    ),
)
def test_a_fault_of_a_ring_ends_the_process(emulator, fault, message):
    with pytest.raises(emulator.KernelFault, match=message):
        ring(emulator, fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    (
        ("touched", "the accumulators of a wgmma changed before it was waited for"),
        ("too few bytes", "lacks|a block ends"),
    ),
)
def test_a_fault_of_a_ring_ends_the_process_in_some_order(emulator, fault, message):
    with pytest.raises(emulator.KernelFault, match=message):
        for seed in range(10):
            ring(emulator, fault, seed)


def test_only_hopper_has_them(emulator):
    a = random(64, 64)
    tensors = {"a": a, "b": a, "c": torch.zeros(64, 64)}
    with pytest.raises(emulator.KernelFault, match="the device has no copy engine"):
        emulator("ring", tensors, ("c",), tokens=64, name="none", major=8, minor=9)


# --- barriers of parts of a block ---


def relay(emulator, fault="none", seed=0):
    numbers = torch.arange(128, dtype=torch.float32) + 1
    result = emulator("relay", {"numbers": numbers}, ("numbers",), seed, name=fault, **HOPPER)["numbers"]
    return torch.equal(result, numbers * 2**6)


def test_a_relay(emulator):
    assert all(relay(emulator, seed=seed) for seed in range(5))


@pytest.mark.parametrize(
    ("fault", "message"),
    (
        ("different counts", "threads meet at a barrier with different counts"),
        ("too many registers", "the warpgroups take more registers than there are"),
        ("uneven registers", "the warps of a warpgroup ask for different numbers of registers"),
    ),
)
def test_a_fault_of_a_relay_ends_the_process(emulator, fault, message):
    with pytest.raises(emulator.KernelFault, match=message):
        relay(emulator, fault)
