"""Every launch of every Triton kernel, compiled for A100 and H100 without a GPU: no spills, memory that fits,
matrix instructions.
"""

import pytest

pytest.importorskip("triton", reason="Triton is to be had on Linux alone")

from kernels.adapter import SHARED_MEMORY  # noqa: E402
from tests.kernels.ahead import adapter_launches, compile_all, other_launches  # noqa: E402

SHARED = 99 * 1024  # what a program may use on every GPU of compute capability 8 or 9


def results(launches, count, capabilities=(80, 90)):
    found = list(compile_all(launches, capabilities))
    assert len(found) == count
    for launch, capability, f in found:
        assert f["spilled"] == 0 and f["registers"] <= 255, (launch, capability, f)
    return found


# bf16, the default, for both GPUs; the others for one (python -m kernels.ahead --dtype fp16 fp32: all of them
# for both)
@pytest.mark.parametrize(
    "dtype, precision, gpus",
    [("bf16", "ieee", 2), ("fp16", "ieee", 1), ("fp32", "ieee", 1), ("fp32", "tf32", 1)],
)
def test_adapter_kernels(dtype, precision, gpus):
    for launch, _, f in results(adapter_launches(dtype, precision), 18 * gpus, (80, 90)[-gpus:]):
        limit = SHARED_MEMORY.get((4 if dtype == "fp32" else 2, launch.constants["BLOCK_R"]), SHARED)
        assert f["shared"] <= limit, (launch, f)
        assert (f["matrix"] > 0) == (dtype != "fp32" or precision == "tf32"), (launch, f)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapter_kernels_of_odd_sizes(dtype):
    """A width and a bottleneck that fill no block: every load is checked."""
    launches = list(adapter_launches(dtype))
    for launch in launches:
        launch.constants.update(D=80, R=launch.constants["BLOCK_R"] - 3)
    results(launches, 18, (80,))


def test_loss_and_distance_kernels():
    for launch, _, f in results(other_launches(), 56):
        assert f["shared"] <= SHARED, (launch, f)
