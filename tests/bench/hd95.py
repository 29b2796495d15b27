"""HD95 against MONAI's way, a k-d tree and all pairs."""

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

import kernels
from kernels.boundary import boundary
from vlsm import metrics


def lesions(count, side, generator):
    """Smooth blobs that cover about a tenth to a third of the image: bool `[count, side, side]`."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    masks = []
    for _ in range(count):
        u = torch.rand(12, generator=generator)
        cy, cx = 0.4 + 0.2 * u[0], 0.4 + 0.2 * u[1]
        radius = 0.18 + 0.14 * u[2]
        angle = torch.atan2(y - cy, x - cx)
        wave = 0
        for k in range(2, 7):
            wave = wave + 0.12 / k * u[k] * torch.sin(k * angle + 6 * u[k + 5])
        masks.append((y - cy) ** 2 + (x - cx) ** 2 < (radius * (1 + wave)) ** 2)
    return torch.stack(masks)


def monai_way(pred, target):
    """HD95 of one pair as MONAI computes it on a CPU: SciPy's erosion and distance transform on the joint
    bounding box.
    """
    rows, cols = (np.flatnonzero((pred | target).any(axis)) for axis in (1, 0))
    box = tuple(slice(max(i[0] - 1, 0), i[-1] + 2) for i in (rows, cols))
    a, b = (m[box] ^ ndimage.binary_erosion(m[box]) for m in (pred, target))
    values = []
    for points, to in ((a, b), (b, a)):
        distances = ndimage.distance_transform_edt(~to).astype(np.float32)[points]
        values.append(np.quantile(distances, 0.95))
    return max(values)


def tree_way(pred, target):
    """HD95 of one pair by a k-d tree on the boundary points."""
    a, b = (np.argwhere(m ^ ndimage.binary_erosion(m)) for m in (pred, target))
    return max(np.quantile(cKDTree(to).query(points)[0], 0.95) for points, to in ((a, b), (b, a)))


def pairs_way(pred, target):
    """HD95 of one pair by the distances of all pairs of boundary pixels, as GPU libraries compute it."""
    a, b = (boundary(m).nonzero().float() for m in (pred, target))
    near_a = torch.cat([torch.cdist(rows, b).amin(1) for rows in a.split(4096)])
    near_b = torch.cat([torch.cdist(rows, a).amin(1) for rows in b.split(4096)])
    return torch.maximum(near_a.quantile(0.95), near_b.quantile(0.95))


def bench_hd95(bench):
    for side in (352, 1024, 2500):
        _hd95(bench, side, 16 if bench.cuda or side < 2500 else 4)


def _hd95(bench, side, count):
    pred, target = lesions(2 * count, side, torch.Generator().manual_seed(0)).split(count)
    arrays = [pred.numpy(), target.numpy()]
    pred, target = pred.to(bench.device), target.to(bench.device)
    values = metrics.hd95(pred, target).cpu()
    sides = dict(ours=lambda: metrics.hd95(pred, target))
    for name, way in (("MONAI's way", monai_way), ("k-d tree", tree_way)):
        sides[name] = lambda way=way: [way(*pair) for pair in zip(*arrays)]
        theirs = torch.tensor(sides[name](), dtype=torch.float64)
        assert (values - theirs).abs().max() < 1e-3, name
    sides["all pairs"] = lambda: [pairs_way(*pair) for pair in zip(pred, target)]
    runs = bench.runs if side < 2500 else max(5, bench.runs // 6)
    times = bench.time(sides, runs, warm=1)
    times_of_a_pair = {name: seconds / count for name, seconds in times.items()}
    _, counts = kernels.surface_distances(pred, target)
    pixels = int(counts.float().median())
    bench.row(f"hd95 {side} x {side}, a pair, of {count}", times_of_a_pair, boundary_pixels=pixels)
