"""The rows of `python -m kernels.bench` that need the whole project."""

from tests import bench_hd95, bench_training

ROWS = dict(hd95=bench_hd95.bench_hd95, **bench_training.ROWS)
