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


def test_metrics_of_nothing():
    assert metrics.dsc([], []).shape == metrics.hd95([], []).shape == (0,)


def test_metrics_refuse_grey_and_unequal_masks():
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metrics.dsc(torch.full((1, 2, 2), 255), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="nothing is broadcast"):
        metrics.iou(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="1 predictions came with 2"):
        metrics.hd95(torch.ones(1, 2, 2), torch.ones(2, 2, 2))


def test_counts_stay_exact_where_float32_does_not():
    """2^24 + 3 pixels: a float32 sum would lose the last ones."""
    side = 4097
    full = torch.ones(1, side, side, dtype=torch.bool)
    less = full.clone()
    less[0, 0, 0] = False
    assert metrics.dsc(less, full).item() == 2 * (side**2 - 1) / (2 * side**2 - 1)
