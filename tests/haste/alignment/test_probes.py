"""The probes against their definitions, and that they leave the run alone."""

from __future__ import annotations

import copy

import pytest
import torch
from haste.alignment import Aligner, LayerMap
from haste.alignment.termination import NOISE_SEED, gradient_cosine, mean_alignment_loss
from haste.models import ModelOutput, SiT
from haste.transport import interpolate, velocity_loss
from small_models import save_teacher
from torch import nn

TIMES = (0.1, 0.6)


@pytest.fixture(scope="module")
def aligner(tmp_path_factory) -> Aligner:
    folder = save_teacher(tmp_path_factory.mktemp("teacher"), num_hidden_layers=2)
    return Aligner.from_pretrained([str(folder)], LayerMap((0,), (1,)), grid=4, proj_coeff=0.25, attn_coeff=2.0)


@pytest.fixture
def model() -> SiT:
    torch.manual_seed(1)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}
    model = SiT(**sizes, hidden_size=16, depth=3, num_heads=2, encoder_depth=2, z_dims=(16,), projector_dim=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # a fresh student's gates are shut, and no gradient of L_v passes them
    return model


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(2)
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    return images, images, torch.arange(6)


def split(batch, size):
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def noise_of(images):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))


def exact_losses(model, aligner, images, labels, time):
    """Of HASTE in float64, from their definitions: L_v, L_R and L_A of the pair of layers 0 and 1."""
    t = torch.full((len(images),), time, dtype=torch.float64)
    noise = noise_of(images).double()
    output = model((1 - time) * images.double() + time * noise, t, labels, (0,), True)
    (target,) = aligner.teacher_outputs(images)
    (q, k), (teacher_q, teacher_k) = output.queries_keys[0], target.queries_keys[0]
    teacher_q, teacher_k = (x[:, :, target.prefix :].double() for x in (teacher_q, teacher_k))
    log_student = (q @ k.mT / q.shape[-1] ** 0.5).log_softmax(-1)
    teacher = (teacher_q @ teacher_k.mT / teacher_q.shape[-1] ** 0.5).softmax(-1)
    attention = -(teacher * log_student).sum(-1).mean()
    feature = -torch.cosine_similarity(output.projections[0], target.patch_tokens.double(), dim=-1).mean()
    return (output.prediction - (noise - images.double())).square().mean(), feature, attention


@pytest.mark.parametrize(("proj_coeff", "attn_coeff"), [(0.25, 2.0), (0.5, 0.0), (0.0, 0.5)])
def test_gradient_cosine_is_that_of_the_whole_alignment_in_float64(model, aligner, batch, proj_coeff, attn_coeff):
    images, _, labels = batch
    exact = copy.deepcopy(model).double().eval()
    parameters = list(exact.blocks[0].parameters())
    cosines = []
    for time in TIMES:
        velocity, feature, attention = exact_losses(exact, aligner, images, labels, time)
        vectors = []
        for loss in (velocity, proj_coeff * feature + attn_coeff * attention):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            vectors.append(torch.cat([gradient.flatten() for gradient in gradients]))
        cosines.append(torch.cosine_similarity(*vectors, dim=0).item())
    weighted = Aligner(aligner.teachers, LayerMap((0,), (1,)) if attn_coeff else None, proj_coeff, attn_coeff)
    measured = gradient_cosine(model, weighted, split(batch, 4), block=0, times=TIMES)
    # The same in fp32 by plain torch is 3e-4 off: weights this large amplify rounding.
    assert measured == pytest.approx(sum(cosines) / len(TIMES), abs=1e-3)


def test_gradient_cosine_is_that_of_backward(model, aligner, batch):
    images, _, labels = batch
    model.eval()
    cosines = []
    for time in TIMES:
        t = torch.full((6,), time)
        x_t, target = interpolate(images, noise_of(images), t)
        gradients = []
        for name in ("alignment", "velocity"):
            model.zero_grad()
            output = model(x_t, t, labels, aligner.student_layers, project=True)
            losses = {"alignment": aligner(output, images)[0], "velocity": velocity_loss(output.prediction, target)}
            losses[name].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.blocks[0].parameters()]).double())
        cosines.append(gradients[0] @ gradients[1] / gradients[0].norm() / gradients[1].norm())
    expected = sum(cosines).item() / len(TIMES)
    assert abs(expected) > 1e-3
    measured = gradient_cosine(model, aligner, split(batch, 6), block=0, times=TIMES)
    assert measured == pytest.approx(expected, abs=1e-5)


class OneNumber(nn.Module):
    """A student of one parameter w, whose velocity is w everywhere and whose projection is `slope` · w."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.ones(()))])])
        self.slope = slope

    def forward(self, x, t, y, aligned_layers=(), project=False):
        w = self.blocks[0][0]
        assert (aligned_layers, project) == (Follow.student_layers, Follow.project)
        return ModelOutput(w.expand(x.shape), [], self.slope * w)


class Follow:
    """The alignment is the projection itself: its gradient is the slope."""

    student_layers, project = (0,), True

    def teacher_outputs(self, images):
        return []

    def with_class_token(self, x, outputs):
        return x

    def losses_of(self, output, outputs):
        return output.projections

    def weigh(self, losses):
        return losses


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_constructed_gradients_agree_or_oppose(slope):
    zeros = torch.zeros(64, 1, 8, 8)
    # w = 1 and targets of mean 0: the gradient of L_v is positive
    batches = [(zeros, zeros, torch.zeros(64, dtype=torch.int64))]
    cosine = gradient_cosine(OneNumber(slope), Follow(), batches, block=0, times=TIMES)
    assert cosine == pytest.approx(1.0 if slope > 0 else -1.0)


def test_mean_alignment_loss_is_the_mean_over_images_and_times(model, aligner, batch):
    images, _, labels = batch
    model.eval()
    expected = []
    for time in TIMES:
        t = torch.full((6,), time)
        x_t, _ = interpolate(images, noise_of(images), t)
        losses = aligner(model(x_t, t, labels, (0,), True), images)[1]
        expected.append((0.25 * losses.feature + 2.0 * losses.attention).item())
    measured = mean_alignment_loss(model, aligner, split(batch, 6), TIMES)
    assert measured == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("probe", ["gradient", "loss"])
def test_the_split_into_batches_and_processes_does_not_matter(model, aligner, batch, probe):
    def measure(batches, reduce=lambda total: total):
        if probe == "gradient":
            return gradient_cosine(model, aligner, batches, 0, TIMES, reduce=reduce)
        return mean_alignment_loss(model, aligner, batches, TIMES, reduce=reduce)

    whole = measure(split(batch, 6))
    assert measure(split(batch, 4)) == pytest.approx(whole, rel=1e-4)  # 4 + 2: unequal batches weigh as their size
    # Twice the same process: sums double, means do not.
    assert measure(split(batch, 6), reduce=lambda total: 2 * total) == pytest.approx(whole, rel=1e-6)


def test_a_probe_under_autocast_is_as_exact_as_without(model, aligner, batch):
    def measure():
        batches = split(batch, 6)
        return gradient_cosine(model, aligner, batches, 0, TIMES), mean_alignment_loss(model, aligner, batches, TIMES)

    expected = measure()
    with torch.autocast("cpu", torch.bfloat16):
        assert measure() == expected


def test_a_probe_leaves_the_run_as_it_was(model, aligner, batch):
    model.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = gradient_cosine(model, aligner, split(batch, 3), 0, TIMES)
    mean_alignment_loss(model, aligner, split(batch, 3), TIMES)
    assert gradient_cosine(model, aligner, split(batch, 3), 0, TIMES) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
