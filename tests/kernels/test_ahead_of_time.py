"""Every launch of every Triton kernel, compiled for A100 and H100 without a GPU: no spills, memory that fits,
matrix instructions.
"""

import pytest

pytest.importorskip("triton", reason="Triton is available on Linux only")

from kernels.adapter import SHARED_MEMORY  # noqa: E402
from tests.kernels.ahead import adapter_launches, compile_all, other_launches  # noqa: E402

SHARED = 99 * 1024  # what a program may use on every GPU of compute capability 8 or 9


def results(launches, count, capabilities=(80, 90)):
    found = list(compile_all(launches, capabilities))
    assert len(found) == count
    for launch, capability, f in found:
        assert f["spilled"] == 0 and f["registers"] <= 255, (launch, capability, f)
    return found


def check_adapter(launches, dtype, precision, gpus):
    launches = list(launches)
    for launch, _, f in results(launches, len(launches) * len(gpus), gpus):
        limit = SHARED_MEMORY.get((4 if dtype == "fp32" else 2, launch.constants["BLOCK_R"]), SHARED)
        assert f["shared"] <= limit, (launch, f)
        assert (f["matrix"] > 0) == (dtype != "fp32" or precision == "tf32"), (launch, f)


@pytest.mark.slow
def test_adapter_kernels_in_the_default_precision():
    launches = list(adapter_launches("bf16"))
    assert len(launches) == 18
    check_adapter(launches, "bf16", "ieee", (90,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, precision, gpus",
    [
        ("bf16", "ieee", (80,)),
        ("fp16", "ieee", (80, 90)),
        ("fp32", "ieee", (80, 90)),
        ("fp32", "tf32", (80, 90)),
    ],
)
def test_adapter_kernels(dtype, precision, gpus):
    check_adapter(adapter_launches(dtype, precision), dtype, precision, gpus)


def odd(launches):
    """A width and a bottleneck that fill no block: every load is checked."""
    for launch in launches:
        launch.constants.update(D=80, R=launch.constants["BLOCK_R"] - 3)
        yield launch


def test_adapter_kernels_of_odd_sizes():
    launches = [launch for launch in odd(adapter_launches("bf16")) if launch.constants["BLOCK_R"] == 64]
    results(launches, 3, (80,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapter_kernels_of_odd_sizes_for_every_width(dtype):
    results(odd(adapter_launches(dtype)), 18, (80,))


def test_loss_and_distance_kernels_as_they_are_launched():
    """Float32 logits, uint8 targets: a launch of each kernel."""
    launches = {launch.kernel: launch for launch in other_launches() if "bf16" not in launch.label}
    launches |= {launch.kernel: launch for launch in other_launches() if launch.label == "fp32, target u8"}
    for launch, _, f in results(launches.values(), 5, (90,)):
        assert f["shared"] <= SHARED, (launch, f)


@pytest.mark.slow
def test_loss_and_distance_kernels():
    for launch, _, f in results(other_launches(), 58):
        assert f["shared"] <= SHARED, (launch, f)
