"""Loss and metrics against plain formulas, stored references and brute force."""

import math

import pytest
import torch
from safetensors.torch import load_file

import vlsm
from kernels import boundary
from tests.conftest import GOLDEN
from vlsm import metrics


def plain_loss(z, y, dice_weight=1.5, bce_weight=1.0, smooth=1e-5):
    """Eq. 2, pixel by pixel, sample by sample, in Python floats."""
    dice, bce, pixels = 0.0, 0.0, 0
    for zs, ys in zip(z.flatten(1).tolist(), y.flatten(1).tolist()):
        p = [1 / (1 + math.exp(-v)) for v in zs]
        dice += 1 - (2 * sum(a * b for a, b in zip(p, ys)) + smooth) / (sum(p) + sum(ys) + smooth)
        bce += sum(-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(p, ys))
        pixels += len(zs)
    return dice_weight * dice / len(z) + bce_weight * bce / pixels


@pytest.mark.parametrize("kind", ["random", "empty", "full"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 7, 5), (2, 9, 4)])
def test_loss_is_equation_2(shape, kind):
    torch.manual_seed(0)
    z = 3 * torch.randn(shape, dtype=torch.double)
    y = dict(random=torch.rand(shape) < 0.4, empty=torch.zeros(shape) > 0, full=torch.ones(shape) > 0)[kind]
    for target in (y, y.to(torch.uint8), y.float()):
        assert vlsm.dice_bce_loss(z, target).item() == pytest.approx(plain_loss(z, y.double()), rel=1e-9)
    assert vlsm.dice_bce_loss(z, y, 1.0, 0.2).item() == pytest.approx(
        plain_loss(z, y.double(), 1.0, 0.2), rel=1e-9
    )


def test_loss_gradient():
    torch.manual_seed(0)
    z = torch.randn(2, 1, 4, 3, dtype=torch.double, requires_grad=True)
    y = (torch.rand(2, 1, 4, 3) < 0.5).double()
    for ce in ("logits", "reference"):
        assert torch.autograd.gradcheck(lambda z, ce=ce: vlsm.dice_bce_loss(z, y, ce=ce), z)


def test_loss_at_saturated_logits_is_finite():
    y = torch.tensor([[[[1.0, 0.0]]]])
    for z in (80.0, -80.0):
        logits = torch.full((1, 1, 1, 2), z, requires_grad=True)
        loss = vlsm.dice_bce_loss(logits, y)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert loss.item() == pytest.approx(40 + 1.5 * (1 if z < 0 else 1 / 3), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 1, 7, 5), (2, 9, 4)])
def test_loss_of_ignored_pixels_by_hand(shape):
    """Sums and means over the other pixels alone, in Python floats; gradients of the ignored exactly 0."""
    torch.manual_seed(0)
    z = (3 * torch.randn(shape, dtype=torch.double)).requires_grad_()
    y = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(3, shape)]
    y.view(-1)[0], y.view(-1)[-1] = 1, 255
    dice, bce, pixels = 0.0, 0.0, 0
    for zs, ys in zip(z.flatten(1).tolist(), y.flatten(1).tolist()):
        pairs = [(1 / (1 + math.exp(-v)), b) for v, b in zip(zs, ys) if b != 255]
        size = sum(p + b for p, b in pairs)
        dice += 1 - (2 * sum(p * b for p, b in pairs) + 1e-5) / (size + 1e-5)
        bce += sum(-b * math.log(p) - (1 - b) * math.log(1 - p) for p, b in pairs)
        pixels += len(pairs)
    loss = vlsm.dice_bce_loss(z, y)
    assert loss.item() == pytest.approx(1.5 * dice / len(z) + bce / pixels, rel=1e-9)
    loss.backward()
    assert not z.grad[y == 255].any() and z.grad[y != 255].all()
    for ce in ("logits", "reference"):
        assert torch.autograd.gradcheck(lambda z, ce=ce: vlsm.dice_bce_loss(z, y, ce=ce), z)


def test_loss_of_nothing_but_ignored_pixels_is_0():
    z = torch.randn(2, 1, 5, 3, requires_grad=True)
    for ce in ("logits", "reference"):
        loss = vlsm.dice_bce_loss(z, torch.full(z.shape, 255, dtype=torch.uint8), ce=ce)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0 and not gradient.any()


def test_reference_cross_entropy_takes_a_second_sigmoid():
    torch.manual_seed(0)
    z, y = torch.randn(2, 1, 5, 5), (torch.rand(2, 1, 5, 5) < 0.5).float()
    p = z.sigmoid()
    want = vlsm.dice_bce_loss(z, y, bce_weight=0) + (torch.nn.functional.softplus(p) - y * p).mean()
    torch.testing.assert_close(vlsm.dice_bce_loss(z, y, ce="reference"), want)
    perfect = vlsm.dice_bce_loss(torch.where(y > 0, 40.0, -40.0), y, ce="reference").item()
    assert perfect == pytest.approx(
        math.log(2) - 0.3799 * y.mean().item(), abs=1e-4
    )  # specs: never 0, even for a perfect mask


def test_loss_never_broadcasts():
    with pytest.raises(ValueError, match="differ in shape"):
        vlsm.dice_bce_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


def brute_force(pred, target):
    """HD95 by its definition: all pairs of boundary points, float64."""

    def edge(mask):
        H, W = mask.shape
        inside = lambda y, x: 0 <= y < H and 0 <= x < W and bool(mask[y, x])  # noqa: E731
        points = mask.nonzero().tolist()
        return torch.tensor(
            [
                p
                for p in points
                if not all(inside(p[0] + a, p[1] + b) for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0)))
            ]
        ).double()

    a, b = edge(pred), edge(target)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return max(torch.quantile(distances.amin(1), 0.95).item(), torch.quantile(distances.amin(0), 0.95).item())


def test_golden_metrics():
    g = load_file(GOLDEN / "metrics.safetensors")
    n = sum(k.startswith("pred.") for k in g)
    assert n == 12
    pred, target = ([g[f"{name}.{i}"] for i in range(n)] for name in ("pred", "target"))
    for ours, name, tolerance in (
        (metrics.hd95, "hd95_monai", 1e-4),
        (metrics.dsc, "dice", 1e-6),
        (metrics.iou, "iou", 1e-6),
    ):
        want = torch.stack([g[f"{name}.{i}"].reshape(()) for i in range(n)])
        torch.testing.assert_close(ours(pred, target), want, atol=tolerance, rtol=0)
    assert (
        metrics.hd95(pred, target) - torch.stack([g[f"hd95_pooled.{i}"].reshape(()) for i in range(n)])
    ).abs().max() > 1


@pytest.mark.parametrize("seed", range(40))
def test_hd95_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    h, w = torch.randint(1, 24, (2,), generator=generator).tolist()
    density = torch.rand(2, generator=generator).tolist()
    pred, target = (torch.rand(h, w, generator=generator) < d for d in density)
    if pred.any() and target.any():
        assert metrics.hd95([pred], [target]).item() == pytest.approx(brute_force(pred, target), abs=1e-9)


@pytest.mark.parametrize("case", ["row", "column", "dot and all", "chunks"])
def test_hd95_of_odd_masks(case, monkeypatch):
    if case == "chunks":
        monkeypatch.setattr(boundary, "CHUNK", 64)
    pred, target = torch.zeros(2, 17, 13, dtype=torch.bool)
    if case == "row":
        pred, target = pred[:1], target[:1]
        pred[0, 2], target[0, 8:] = True, True
    elif case == "column":
        pred, target = pred[:, :1], target[:, :1]
        pred[3], target[9:12] = True, True
    else:
        pred[5, 5], target[:] = True, True
    assert metrics.hd95([pred], [target]).item() == pytest.approx(brute_force(pred, target), abs=1e-9)


def test_empty_masks():
    empty, some = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)
    some[1, 2] = True
    pred, target = torch.stack([empty, empty, some, some]), torch.stack([empty, some, empty, some])
    assert metrics.dsc(pred, target).tolist() == [1, 0, 0, 1]
    assert metrics.iou(pred, target).tolist() == [1, 0, 0, 1]
    distances = metrics.hd95(pred, target)
    assert distances[[0, 3]].tolist() == [0, 0] and distances[[1, 2]].isnan().all()


def test_ignored_pixels_are_background_in_both():
    generator = torch.Generator().manual_seed(2)
    pred = torch.rand(6, 15, 11, generator=generator) < 0.4
    target = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(3, pred.shape, generator=generator)]
    target[3] = 255
    target[4][target[4] == 1] = 0
    clean_pred, clean_target = pred & (target != 255), target == 1
    for metric in (metrics.dsc, metrics.iou, metrics.hd95, metrics.nsd):
        want = metric(clean_pred, clean_target)
        assert torch.equal(metric(pred, target).nan_to_num(-1), want.nan_to_num(-1))
        assert torch.equal(metric(list(pred), list(target)).nan_to_num(-1), want.nan_to_num(-1))
    assert metrics.dsc(pred, target)[3] == 1, "all is ignored: both are empty"
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metrics.dsc(target, pred)


def test_metrics_of_nothing():
    assert metrics.dsc([], []).shape == metrics.hd95([], []).shape == (0,)


def test_metrics_refuse_grey_and_unequal_masks():
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metrics.dsc(torch.full((1, 2, 2), 255), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="nothing is broadcast"):
        metrics.iou(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="1 predictions came with 2"):
        metrics.hd95(torch.ones(1, 2, 2), torch.ones(2, 2, 2))


def test_metrics_of_an_ignored_target_of_another_shape():
    with pytest.raises(ValueError, match="nothing is broadcast"):
        metrics.dsc(torch.ones(1, 2, 2), torch.full((1, 2, 3), 255, dtype=torch.uint8))


def test_counts_stay_exact_where_float32_does_not():
    """2^24 + 3 pixels: a float32 sum would lose the last ones."""
    side = 4097
    full = torch.ones(1, side, side, dtype=torch.bool)
    less = full.clone()
    less[0, 0, 0] = False
    assert metrics.dsc(less, full).item() == 2 * (side**2 - 1) / (2 * side**2 - 1)
