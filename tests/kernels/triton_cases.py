"""The Triton kernels themselves against their plain-torch twins in float64: on a GPU where there is one, else in Triton's
interpreter.

Not collected with the other tests: test_kernels.py runs this file in a process of its own, as the interpreter
must be chosen before Triton is imported. By hand: `TRITON_INTERPRET=1 python -m pytest
tests/kernels/triton_cases.py`, on a GPU without the variable.
"""

import pytest
import torch

from kernels import adapter, adapter_bottleneck, boundary, dice_bce, dice_bce_loss, dispatch
from kernels.adapter import adapter_torch
from kernels.dice_bce import dice_bce_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# the interpreter multiplies bf16 wrongly (Triton 3.9); a GPU does not
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")

torch.use_deterministic_algorithms(
    True
)  # also fills fresh memory with nan, so that what a kernel leaves out shows
torch.backends.cuda.matmul.allow_tf32 = False


def test_the_kernels_are_what_is_tested():
    assert dispatch.runs_triton(torch.zeros(1, device=DEVICE))


def error(got, want):
    """Largest error relative to the largest entry."""
    assert got.shape == want.shape
    return (
        ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
        if want.numel()
        else 0.0
    )


def lattice(generator, *shape, step, span):
    """Odd multiples of `step`, up to `span` of them each way: sums and products of these are exact, so no
    ReLU flips by rounding.
    """
    return (2 * torch.randint(-span, span, shape, generator=generator) + 1) * step


def operands(n, d, r, dtype, seed=0, residual_dtype=None):
    g = torch.Generator().manual_seed(seed)
    h = lattice(g, n, d, step=0.5, span=2).to(dtype)
    residual = torch.randn(n, d, generator=g).to(residual_dtype or dtype)
    # hidden units: odd multiples of 1/16 (the bias) plus multiples of 1/8; outputs: of 1/512 plus of 1/256;
    # so never 0
    w1, b1 = lattice(g, r, d, step=1 / 8, span=1) * 2, lattice(g, r, step=1 / 16, span=4)
    w2, b2 = lattice(g, d, r, step=1 / 16, span=2), lattice(g, d, step=1 / 512, span=64)
    upstream = torch.randn(n, d, generator=g).to(torch.promote_types(dtype, residual.dtype))
    return [t.to(DEVICE) for t in (h, residual, w1, b1, w2, b2)], upstream.to(DEVICE)


def compare(tensors, upstream, tolerance):
    """Output and every gradient of the kernel against its twin in float64."""
    own = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = adapter_bottleneck(*own)
    known = [t for t in own if t is not None]
    got = torch.autograd.grad(out, known, upstream)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = adapter_torch(*exact)
    wanted = torch.autograd.grad(want, [t for t in exact if t is not None], upstream.double())
    assert error(out, want) <= tolerance
    for tensor, g, w in zip(known, got, wanted):
        assert g.dtype == tensor.dtype and error(g, w) <= tolerance
    return out, got


SIZES = [
    (5, 48, 8),
    (67, 80, 33),
    (70, 512, 64),
    (33, 768, 96),
    (1, 16, 1),
    (40, 128, 200),
    (20, 96, 512),
    (0, 32, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d, r", SIZES)
def test_adapter(n, d, r, dtype):
    compare(*operands(n, d, r, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(8))
def test_adapter_of_random_sizes(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, r = (int(torch.randint(1, top, (), generator=g)) for top in (150, 20, 90))
    tensors, upstream = operands(n, 16 * d, r, torch.float32, seed)
    if seed % 2:
        tensors[1] = None
    compare(tensors, upstream, TOLERANCE[torch.float32])


def test_adapter_of_any_width():
    compare(*operands(37, 50, 11, torch.float32), TOLERANCE[torch.float32])


def test_adapter_of_rows_of_zeros():
    tensors, upstream = operands(40, 64, 16, torch.float32)
    tensors[0][::3] = 0
    upstream[10:20] = 0
    compare(tensors, upstream, TOLERANCE[torch.float32])


def test_adapter_of_strided_inputs():
    tensors, upstream = operands(24, 64, 16, torch.float32)
    tensors[0] = tensors[0].repeat_interleave(2, 1)[:, ::2].view(2, 12, 64).transpose(0, 1)
    tensors[1] = tensors[1].view(2, 12, 64).transpose(0, 1)
    compare(tensors, upstream.view(2, 12, 64).transpose(0, 1), TOLERANCE[torch.float32])
    compare(tensors, upstream[:1, None].expand(12, 2, 64), TOLERANCE[torch.float32])


def test_adapter_of_half_on_a_float32_stream():
    """What autocast makes: h in half precision, the residual stream and the weights in float32."""
    out, _ = compare(
        *operands(50, 64, 16, torch.float16, residual_dtype=torch.float32), TOLERANCE[torch.float16]
    )
    assert out.dtype == torch.float32


def test_adapter_gives_the_same_bits_twice():
    tensors, upstream = operands(300, 64, 16, torch.float32)
    tensors[0] = tensors[0] + 0.1 * torch.randn_like(tensors[0])
    runs = []
    for _ in range(2):
        own = [t.detach().clone().requires_grad_() for t in tensors]
        runs.append(torch.autograd.grad(adapter_bottleneck(*own), own, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("with_h, with_weights", [(True, False), (False, True)])
def test_adapter_with_some_gradients_only(with_h, with_weights):
    tensors, upstream = operands(40, 64, 16, torch.float32)
    for i, t in enumerate(tensors):
        t.requires_grad_(with_h if i < 2 else with_weights)
    adapter_bottleneck(*tensors).backward(upstream)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    adapter_torch(*exact).backward(upstream.double())
    for ours, theirs in zip(tensors, exact):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or error(ours.grad, theirs.grad) <= 1e-5


def loss_and_gradient(loss, logits, target, **options):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    return value, gradient


TARGETS = {
    "random": lambda shape: (torch.rand(shape) < 0.3).to(torch.uint8),
    "empty": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "full": lambda shape: torch.ones(shape, dtype=torch.uint8),
    "soft": lambda shape: torch.rand(shape),
    "ignored in part": lambda shape: torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(3, shape)],
    "all ignored": lambda shape: torch.full(shape, 255, dtype=torch.uint8),
}


@pytest.mark.parametrize("ce", ["logits", "reference"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 7, 5), (2, 1, 90, 101), (35, 1, 6, 3)])
def test_dice_bce(shape, kind, ce):
    torch.manual_seed(0)
    target = TARGETS[kind](shape).to(DEVICE)
    for scale in (1, 6, 80):
        logits = (scale * torch.randn(shape)).to(DEVICE)
        if scale == 80:
            logits = logits.sign() * 80
        value, gradient = loss_and_gradient(dice_bce_loss, logits, target, ce=ce)
        want, wanted = loss_and_gradient(dice_bce_torch, logits.double(), target, ce=ce)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-8)
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-9
        assert not gradient[target == 255].any()


@pytest.mark.parametrize("ce", ["logits", "reference"])
def test_dice_bce_is_not_moved_by_what_is_ignored(ce):
    torch.manual_seed(3)
    logits = torch.randn(3, 1, 70, 90, device=DEVICE)
    target = (torch.rand(3, 1, 70, 90) < 0.3).to(torch.uint8).to(DEVICE)
    target[1] = 255
    target[2, :, 20:] = 255
    other = torch.where(target == 255, 60 * torch.randn_like(logits), logits)
    for loss in (dice_bce_loss, dice_bce_torch):
        value, gradient = loss_and_gradient(loss, logits, target, ce=ce)
        moved, moved_gradient = loss_and_gradient(loss, other, target, ce=ce)
        assert value == moved and torch.equal(gradient, moved_gradient)
        assert not gradient[target == 255].any() and gradient[target != 255].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dice_bce_of_each_type(dtype):
    torch.manual_seed(1)
    logits, target = (
        (4 * torch.randn(2, 1, 40, 50)).to(DEVICE, dtype),
        (torch.rand(2, 1, 40, 50) < 0.5).to(DEVICE),
    )
    value, gradient = loss_and_gradient(
        dice_bce_loss, logits, target, dice_weight=1.0, bce_weight=0.2, smooth=1.0
    )
    want, wanted = loss_and_gradient(
        dice_bce_torch, logits.double(), target, dice_weight=1.0, bce_weight=0.2, smooth=1.0
    )
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    assert error(gradient, wanted) <= TOLERANCE[dtype]


def test_dice_bce_of_strided_logits():
    logits, target = (
        torch.randn(2, 1, 30, 40, device=DEVICE).mT,
        torch.rand(2, 1, 30, 40, device=DEVICE).mT > 0.5,
    )
    value, gradient = loss_and_gradient(dice_bce_loss, logits, target)
    want, wanted = loss_and_gradient(dice_bce_torch, logits.double(), target)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    assert error(gradient, wanted) <= 1e-5


def random_masks(seed):
    g = torch.Generator().manual_seed(seed)
    b, h, w = (int(torch.randint(1, top, (), generator=g)) for top in (4, 45, 45))
    pair = [
        torch.rand(b, h, w, generator=g) < torch.rand((), generator=g) ** (1 + seed % 3) for _ in range(2)
    ]
    if seed % 5 == 0:
        pair[0][0] = False
    if seed % 7 == 0:
        pair[1][-1] = True
    return [m.to(DEVICE) for m in pair]


def distances_by_definition(pred, target):
    """(Of pred's boundary pixels, of target's): squared distances of masks `[H, W]`, from all pairs."""
    a, b = boundary.boundary(pred).nonzero(), boundary.boundary(target).nonzero()
    squared = (a[:, None] - b).square().sum(2)
    return squared.amin(1), squared.amin(0)


@pytest.mark.parametrize("seed", range(14))
def test_surface_distances(seed):
    pred, target = random_masks(seed)
    squared, counts = boundary.surface_distances(pred, target)
    parts, n = squared.split(counts.flatten().tolist()), len(pred)
    for i, (p, t) in enumerate(zip(pred, target)):
        assert counts[:, i].tolist() == [boundary.boundary(m).sum().item() for m in (p, t)]
        if p.any() and t.any():
            of_pred, of_target = distances_by_definition(p, t)
            assert torch.equal(parts[i].long(), of_pred) and torch.equal(parts[n + i].long(), of_target)
            of_pred, of_target = boundary.surface_distances_torch(p[None], t[None])[0].split(
                [len(of_pred), len(of_target)]
            )
            assert torch.equal(parts[i], of_pred) and torch.equal(parts[n + i], of_target)


def test_surface_distances_far_apart():
    """The nearest pixel lies in another column, more than one block away."""
    pred, target = torch.zeros(2, 1, 40, 600, dtype=torch.bool, device=DEVICE)
    pred[0, 0, 2], target[0, 30, 590] = True, True
    squared, counts = boundary.surface_distances(pred, target)
    assert squared.tolist() == [588**2 + 30**2] * 2 and counts.tolist() == [[1], [1]]


if DEVICE == "cuda":

    def test_compiled_in_one_graph():
        tensors, upstream = operands(100, 64, 16, torch.bfloat16)
        target = torch.rand(100, 64, device=DEVICE) > 0.5

        def step(*tensors):
            out = adapter_bottleneck(*tensors)
            return out, dice_bce_loss(out.view(4, 1, 100, 16), target.view(4, 1, 100, 16))

        results = []
        for f in (step, torch.compile(step, fullgraph=True)):
            own = [t.detach().clone().requires_grad_() for t in tensors]
            out, loss = f(*own)
            results.append((out, loss, *torch.autograd.grad((out * upstream).sum() + loss, own)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wanted", [(0, 1), (2, 3, 4, 5), (1,), (0, 4)])
def test_adapter_computes_only_the_gradients_that_are_needed(wanted, monkeypatch):
    tensors, _ = operands(12, 32, 16, torch.float32)
    asked = []
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    backward = adapter._backward
    monkeypatch.setattr(adapter, "_backward", lambda *args: asked.append(args[-2:]) or backward(*args))
    adapter_bottleneck(*tensors).sum().backward()
    assert asked == ([(0 in wanted, any(i in wanted for i in (2, 3, 4, 5)))] if wanted != (1,) else [])
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(wanted)


def test_adapter_keeps_nothing_without_gradients():
    tensors, _ = operands(12, 32, 16, torch.float32)
    with torch.no_grad():
        assert [t.numel() for t in adapter._forward(*tensors, False)] == [12 * 32, 0]


def test_ops_are_registered_rightly():
    tensors, _ = operands(12, 32, 16, torch.float32)
    h, _, w1, _, w2, b2 = tensors
    utils = ("test_schema", "test_autograd_registration")  # fake tensors have no place in the interpreter
    own = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(adapter._forward, (*own, True), test_utils=utils)
    torch.library.opcheck(adapter._forward, (own[0], None, *own[2:], True), test_utils=utils)
    g, a = torch.randn_like(h), torch.rand(12, 16, device=DEVICE)
    torch.library.opcheck(adapter._backward, (g, h, a, w1, w2, b2, True, True), test_utils=utils)
    z, y = torch.randn(2, 20, device=DEVICE, requires_grad=True), torch.rand(2, 20, device=DEVICE)
    torch.library.opcheck(dice_bce._forward, (z, y, 1.5, 1.0, 1e-5, "logits"), test_utils=utils)
    one, terms = torch.ones((), device=DEVICE), torch.randn(2, 3, device=DEVICE)
    torch.library.opcheck(dice_bce._backward, (one, z.detach(), y, terms, 1.0, "reference"), test_utils=utils)
