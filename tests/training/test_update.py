"""One update: down the gradient, clipped, in parts, and not at all where something is not finite."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from bigtrain.training.update import NO_GRADIENT, NO_LOSS, PROBLEMS, Update


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(params=["looks here", "on the device"])
def fused(request):
    """Whether a fused optimizer skips a step by a flag on the device, or this process looks before it."""
    return request.param == "on the device"


def one_weight(accelerator, value=1.0, fused=False, **options):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, fused=fused or None)
    update = Update(accelerator, module, optimizer, **options)
    assert update.skips_on_device == fused
    return module.weight, update


def problem_of(taken):
    return PROBLEMS[int(taken.problem)]


def test_step_down_gradient(accelerator, fused):
    """An update is a step down the gradient, and gradients of two updates do not add up."""
    weight, update = one_weight(accelerator, fused=fused)
    for expected in (1 - 0.5 * 3, -0.5 - 0.5 * 3):  # twice: gradients do not add up
        update.backward(weight.sum() * 3)
        figures, problem = update.take()
        assert weight.item() == pytest.approx(expected)
        assert (figures["gradient_norm"].item(), PROBLEMS[int(problem)]) == (3, "")
    assert figures["loss"].item() == pytest.approx(-1.5)


def test_clip(accelerator, fused):
    """Gradients are clipped to a norm, and the norm before clipping is reported."""
    weight, update = one_weight(accelerator, fused=fused, clip=1.0)
    update.backward(weight.sum() * 30)
    figures, _ = update.take()
    assert weight.item() == pytest.approx(0.5, abs=1e-4) and figures["gradient_norm"].item() == 30


def test_the_parts_of_a_step_add_up(accelerator, fused):
    weight, update = one_weight(accelerator, fused=fused)
    for part in range(3):
        update.backward(weight.sum() * 2, last=part == 2)
    figures, _ = update.take()
    assert weight.item() == pytest.approx(1 - 0.5 * 6) and figures["loss"].item() == pytest.approx(6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1])
def test_loss_not_finite(accelerator, fused, bad, at):
    """A loss that is not finite skips the step before it reaches a gradient."""
    weight, update = one_weight(accelerator, fused=fused)
    for part in range(2):
        update.backward(weight.sum() * (bad if part == at else 3), last=part == 1)
    assert fused or weight.grad is None or weight.grad.isfinite().all()
    assert problem_of(update.take()) == NO_LOSS
    assert weight.item() == 1
    update.backward(weight.sum() * 3)
    assert problem_of(update.take()) == "" and weight.item() == pytest.approx(-0.5)  # nothing of it is left


class FiniteLossInfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_gradient_not_finite(accelerator, fused):
    """A gradient that is not finite skips the step."""
    weight, update = one_weight(accelerator, fused=fused, clip=1.0)
    update.backward(FiniteLossInfiniteGradient.apply(weight).sum())
    figures, problem = update.take()
    assert PROBLEMS[int(problem)] == NO_GRADIENT and figures["loss"].item() == 1 and weight.item() == 1
    assert weight.grad is None


def test_moments_after_skip(accelerator, fused):
    """The optimizer's step count and weights are those of the steps that were taken."""
    weights = []
    for losses in ((3, float("nan"), 2), (3, 2)):
        module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.weight, 1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused or None)
        update = Update(accelerator, module, optimizer)
        for factor in losses:
            update.backward(module.weight.sum() * factor)
            update.take()
        weights.append((module.weight.item(), optimizer.state[module.weight]["step"].item()))
    assert weights[0] == weights[1]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def scaled(request, accelerator):
    """One weight that is trained in fp16."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    accelerator = accelerator if request.param == "cpu" else Accelerator()
    weight, update = one_weight(accelerator, precision="fp16")
    weight.data = weight.data.to(request.param)
    return weight, update


def test_fp16_overflow(scaled):
    """FP16 lowers its scale where a step overflows, and takes the next step."""
    weight, update = scaled
    before = update.scaler.get_scale()
    update.backward(FiniteLossInfiniteGradient.apply(weight).sum())
    assert problem_of(update.take()) == NO_GRADIENT and weight.item() == 1
    assert update.scaler.get_scale() == before / 2 and update.searches_scale(NO_GRADIENT)
    update.backward(weight.sum() * 3)
    figures, problem = update.take()
    assert (PROBLEMS[int(problem)], weight.item(), figures["gradient_norm"].item()) == (
        "",
        pytest.approx(-0.5),
        pytest.approx(3),
    )


def test_fp16_scale_search(scaled):
    """Neither a non-finite loss nor an overflow at the lowest scale counts as a search for a scale."""
    weight, update = scaled
    assert not update.searches_scale(NO_LOSS)
    for _ in range(16):
        update.backward(FiniteLossInfiniteGradient.apply(weight).sum())
        update.take()
    assert update.scaler.get_scale() == 1 and not update.searches_scale(NO_GRADIENT)


def test_norm_of_a_first_step_skipped(accelerator, fused):
    """Where no gradient was measured its norm is the number 0, at the first step as at the next; on the device it was
    measured, and is NaN."""
    weight, update = one_weight(accelerator, fused=fused)
    for _ in range(2):
        update.backward(weight.sum() * torch.nan)
        figures, problem = update.take()
        assert PROBLEMS[int(problem)] == NO_LOSS
        assert figures["gradient_norm"].isnan() if fused else figures["gradient_norm"] == 0


class Engine:
    """Notes what DeepSpeed's engine is asked for."""

    def __init__(self):
        self.asked, self.optimizer = [], SimpleNamespace(overflow=False)

    def set_gradient_accumulation_boundary(self, last):
        self.asked.append(last)

    def backward(self, loss):
        self.asked.append(loss.item())

    def step(self):
        self.asked.append("step")

    def get_global_grad_norm(self):
        return 3.0


@pytest.mark.parametrize(
    ("losses", "overflow", "asked", "problem"),
    [
        ((4,), False, "[True, 4.0, 'step']", ""),
        ((2, 4), False, "[False, 2.0, True, 4.0, 'step']", ""),
        ((4,), True, "[True, 4.0, 'step']", NO_GRADIENT),
        ((float("nan"), 4), False, "[]", NO_LOSS),  # nothing was begun, so there is no step to throw away
        ((2, float("nan")), True, "[False, 2.0, True, nan, 'step']", NO_LOSS),
    ],
)
def test_what_deepspeed_is_asked(losses, overflow, asked, problem):
    """The last part ends the step; a non-finite loss is passed on only to invalidate parts already accumulated."""
    engine = Engine()
    engine.optimizer.overflow = overflow
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, gather=lambda tensor: tensor)
    update = Update(accelerator, engine, engine.optimizer)
    *first, last = (torch.tensor(float(loss)) for loss in losses)
    for loss in first:
        update.backward(loss, last=False)
    update.backward(last)
    figures, why = update.take()
    assert (repr(engine.asked), PROBLEMS[int(why)]) == (asked, problem)
    assert figures["gradient_norm"] == (3 if engine.asked else 0)


def test_momentum_after_first_skip(accelerator, fused):
    """A very first step that is skipped leaves no momentum behind."""
    weights = []
    for losses in ((float("nan"), 3, 2), (3, 2)):
        module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.weight, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=fused or None)
        update = Update(accelerator, module, optimizer)
        for factor in losses:
            update.backward(module.weight.sum() * factor)
            update.take()
        weights.append(module.weight.item())
    assert weights[0] == weights[1]
