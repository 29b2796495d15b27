"""Every launch of every Triton kernel, compiled for many GPUs without one: no spills but the known ones, memory
that fits, matrix instructions.
"""

import warnings
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="Triton is available on Linux only")

from kernels.adapter import SHARED_MEMORY  # noqa: E402
from tests.kernels.ahead import CAPABILITIES, adapter_launches, compile_all, other_launches, refusal  # noqa: E402

SHARED = 99 * 1024  # what a program may use on every NVIDIA GPU of compute capability 8.0 or more
SHARED_AMD = 64 * 1024
# (start of Triton's version, targets, end of the launches' label, bytes a thread at most); slower, not wrong
KNOWN_SPILLS = (
    ("3.8.", CAPABILITIES, "fp32 d 768 r 512", 2600),
    ("3.8.", (100,), "bf16 d 768 r 256", 8),
    ("", (120,), "bf16 d 768 r 16", 16),
    ("", ("gfx942",), "bf16 d 768 r 128", 700),
    ("", ("gfx942",), "bf16 d 768 r 256", 700),
    ("", ("gfx942",), "bf16 d 768 r 512", 700),
)


def known_spill(launch, target):
    """Return the bytes that a launch is known to spill with this Triton; they are not a failure."""
    for version, targets, label, nbytes in KNOWN_SPILLS:
        if triton.__version__.startswith(version) and target in targets and launch.label == label:
            return nbytes
    return 0


def results(launches, count, targets):
    """Compile `count` launches and judge registers and spills; skips a target unknown to Triton."""
    for target in targets:
        reason = refusal(target)
        if reason:
            pytest.skip(reason)
    found = list(compile_all(launches, targets))
    assert len(found) == count
    for launch, target, f in found:
        assert f["spilled"] <= known_spill(launch, target), (launch, target, f)
        if f["spilled"]:
            words = f"{launch.kernel}, {launch.label}, on {target}: {f['spilled']} bytes a thread"
            warnings.warn(f"known to spill with Triton {triton.__version__}: {words}", stacklevel=2)
        shared = SHARED_AMD if target == "gfx942" else SHARED
        element = 4 if launch.label.startswith("fp32") else 2
        limit = SHARED_MEMORY.get((element, launch.constants.get("BLOCK_R")), shared)
        assert f["shared"] <= limit, (launch, target, f)
        assert f["registers"] <= (512 if target == "gfx942" else 255), (launch, target, f)
    return found


def check_adapter(launches, dtype, precision, target):
    launches = list(launches)
    for launch, _, f in results(launches, len(launches), (target,)):
        assert (f["matrix"] > 0) == (dtype != "fp32" or precision == "tf32"), (launch, f)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, precision, target",
    [
        ("bf16", "ieee", 80),
        ("bf16", "ieee", 90),
        ("fp16", "ieee", 86),
        ("fp16", "ieee", 90),
        ("fp32", "ieee", 80),
        ("fp32", "ieee", 90),
        ("fp32", "tf32", 89),
        ("fp32", "tf32", 90),
    ],
)
def test_adapter_kernels(dtype, precision, target):
    check_adapter(adapter_launches(dtype, precision), dtype, precision, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [86, 89, 100, 120, "gfx942"])
def test_some_adapter_kernels_of_other_gpus(target):
    launches = [launch for launch in adapter_launches("bf16") if launch.constants["BLOCK_R"] in (16, 64, 512)]
    check_adapter(launches, "bf16", "ieee", target)


def odd(launches):
    """A width and a bottleneck that fill no block: every load is checked."""
    for launch in launches:
        launch.constants.update(D=80, R=launch.constants["BLOCK_R"] - 3)
        launch.label += ", odd"
        yield launch


def test_adapter_kernels_of_odd_sizes():
    launches = [launch for launch in odd(adapter_launches("bf16")) if launch.constants["BLOCK_R"] == 64]
    results(launches, 3, (80,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapter_kernels_of_odd_sizes_for_every_width(dtype):
    results(odd(adapter_launches(dtype)), 18, (80,))


def as_launched():
    """A launch of each kernel of the loss, of bf16 logits and uint8 targets, and of the distances."""
    launches = {launch.kernel: launch for launch in other_launches()}
    launches |= {launch.kernel: launch for launch in other_launches() if launch.label == "bf16, target u8"}
    return list(launches.values())


def test_loss_and_distance_kernels_as_they_are_launched():
    results(as_launched(), 5, (90,))


@pytest.mark.slow
def test_loss_and_distance_kernels():
    results(other_launches(), 29, (90,))


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 86, 89, 100, 120, "gfx942"])
def test_loss_and_distance_kernels_of_other_gpus(target):
    results(as_launched(), 5, (target,))


@pytest.mark.slow
def test_loss_and_distance_kernels_of_images_of_odd_sides():
    results([replace(launch, odd=True) for launch in as_launched()], 5, (90,))
