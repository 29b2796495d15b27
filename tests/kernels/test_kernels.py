"""The fused ops on a CPU: formulas, gradients, registration, compilation.

The Triton kernels are proved by triton_cases.py, run below.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import vlsm
from kernels import adapter_bottleneck, dice_bce_loss, dispatch, surface_distances, use_kernels
from kernels.adapter import adapter_torch
from kernels.boundary import _by_pairs, _by_transform, boundary
from kernels.dice_bce import dice_bce_torch
from tests.conftest import GOLDEN, ROOT

ADAPTER, LOSS, DISTANCES = (
    sys.modules["kernels.adapter"],
    sys.modules["kernels.dice_bce"],
    sys.modules["kernels.boundary"],
)
BACKENDS = ["aot_eager"] + ["inductor"] * bool(shutil.which("g++"))


def test_triton_kernels():
    """triton_cases.py, in Triton's interpreter unless there is a GPU; every case must run."""
    environment = (
        dict(os.environ)
        if torch.cuda.is_available()
        else dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/triton_cases.py",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert int(re.match(r"(\d+) passed", summary)[1]) >= 80 and "skipped" not in summary, summary


def operands(n=12, d=10, r=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (n, d), (r, d), (r,), (d, r), (d,)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("f", [adapter_bottleneck, adapter_torch])
def test_adapter_gradcheck(f):
    tensors = operands(5, 4, 3)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradcheck(lambda h, *w: f(h, None, *w), [tensors[0], *tensors[2:]])


@pytest.mark.parametrize("seed", range(6))
def test_adapter_is_the_formula(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, r = (int(torch.randint(1, 70, (), generator=g)) for _ in range(3))
    tensors = operands(n, d, r, seed=seed)
    upstream = torch.randn(n, d, dtype=torch.float64, generator=g)
    want = adapter_torch(*tensors)
    got = adapter_bottleneck(*tensors)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, tensors, upstream)
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_adapter_of_batches_and_strides():
    h, residual, *weights = operands(24, 10, 6)
    h, residual = h.view(2, 12, 10).transpose(0, 1), residual.view(2, 12, 10).transpose(0, 1)
    torch.testing.assert_close(
        adapter_bottleneck(h, residual, *weights), adapter_torch(h, residual, *weights)
    )
    torch.testing.assert_close(
        adapter_bottleneck(h[0, 0], None, *weights), adapter_torch(h[0, 0], None, *weights)
    )


def test_adapter_refuses_what_does_not_fit():
    h, residual, *weights = operands()
    with pytest.raises(ValueError, match="do not fit together"):
        adapter_bottleneck(h[:, :-1], residual, *weights)
    with pytest.raises(ValueError, match="do not fit together"):
        adapter_bottleneck(h, residual[:1], *weights)


def test_adapter_under_autocast():
    """As an adapter of `nn.Linear`s: half precision products, gradients of the weights in float32, the stream
    stays as it is.
    """
    tensors = [t.detach().float().requires_grad_() for t in operands(40, 16, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        h = tensors[0] @ torch.eye(16)
        assert h.dtype == torch.bfloat16
        out = adapter_bottleneck(h, *tensors[1:])
        alone = adapter_bottleneck(tensors[0], None, *tensors[2:])
    assert out.dtype == torch.float32 and alone.dtype == torch.bfloat16
    torch.testing.assert_close(out, adapter_torch(*tensors), rtol=0.05, atol=0.1)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("ce", ["logits", "reference"])
def test_loss_gradcheck(ce):
    torch.manual_seed(0)
    z, y = torch.randn(2, 1, 4, 3, dtype=torch.double, requires_grad=True), torch.rand(2, 1, 4, 3) < 0.5
    for f in (dice_bce_loss, dice_bce_torch):
        assert torch.autograd.gradcheck(lambda z, f=f: f(z, y, ce=ce), z)


@pytest.mark.parametrize("ce", ["logits", "reference"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.float32])
def test_loss_is_the_formula(kind, ce):
    torch.manual_seed(0)
    y = (torch.rand(3, 1, 20, 30) < 0.3).to(kind)
    for scale in (1, 80):
        z = (scale * torch.randn(y.shape)).requires_grad_()
        got, want = dice_bce_loss(z, y, 1.0, 0.2, 1e-5, ce), dice_bce_torch(z.double(), y, 1.0, 0.2, 1e-5, ce)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        (a,), (b,) = torch.autograd.grad(got, z), torch.autograd.grad(want, z)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_loss_of_float_targets_reads_them_as_they_are():
    y = torch.rand(2, 1, 5, 5)
    z = torch.randn(2, 1, 5, 5)
    assert dice_bce_loss(z, y).item() == pytest.approx(dice_bce_torch(z.double(), y).item(), rel=1e-5)
    assert dice_bce_loss(z, y).item() != pytest.approx(dice_bce_loss(z, y > 0.5).item(), rel=1e-3)


def test_the_distance_op_is_registered_rightly():
    masks = torch.rand(2, 2, 6, 7) < 0.5
    torch.library.opcheck(DISTANCES._surface_distances, (*masks, False))


def same_when_compiled(step, tensors, backend):
    """A step's results (the last one is the loss) and gradients, eager and in one compiled graph."""
    torch._dynamo.reset()
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend=backend)):
        *rest, loss = f()
        results.append((*rest, loss, *torch.autograd.grad(loss, tensors)))
    for eager, compiled in zip(*results):
        assert (compiled - eager).abs().max() <= 2e-4 * eager.abs().max() + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, options",
    [
        ("dense", dict(dim=8)),
        ("shallow", dict(dim=8, branches="vlc")),
    ],
)
def test_model_and_loss_compile_into_one_graph(method, options):
    torch.manual_seed(0)
    model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", method, **options)
    pixels, ids = torch.randn(2, 3, 64, 64), torch.tensor([[198, 5, 6, 199], [198, 7, 199, 199]])
    mask, target = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.rand(2, 1, 64, 64) < 0.5

    def step():
        logits = model(pixels, ids, mask)
        return logits, vlsm.dice_bce_loss(logits, target)

    same_when_compiled(step, list(model.tuned_parameters().values()), "aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_compile_into_one_graph(backend):
    tensors = [t.detach().float().requires_grad_() for t in operands(12, 10)]
    target = torch.rand(3, 1, 4, 10) < 0.5

    def step():
        out = adapter_bottleneck(*tensors)
        return out, dice_bce_loss(out.view(3, 1, 4, 10), target)

    same_when_compiled(step, tensors, backend)


class NoGPU:
    """What Triton's driver would say of an H100; it launches nothing."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(not dispatch.AVAILABLE, reason="Triton is available on Linux only")
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_kernels_themselves_trace_into_one_graph(dynamic, monkeypatch):
    """`torch.compile` of the GPU's branch, without a GPU: forward and backward graphs hold the launches and
    give the right tensors.
    """
    import triton
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def record(graph, _):
        """A compiler whose code returns zeros of the right sizes."""
        graphs.append(graph)
        size = lambda n: n.node.hint if isinstance(n, torch.SymInt) else n  # noqa: E731

        def result(node):
            value = node.meta["val"] if hasattr(node, "meta") else node
            return (
                torch.zeros([size(n) for n in value.shape], dtype=value.dtype)
                if torch.is_tensor(value)
                else size(value)
            )

        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        return make_boxed_func(lambda *_: [result(node) for node in outputs])

    torch._dynamo.reset()
    for module in (ADAPTER, LOSS):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    h, residual, *weights = operands(97, 768, 64, torch.float32)
    h = h.detach().bfloat16().requires_grad_()
    target = torch.rand(97, 768) < 0.5

    def step(*tensors):
        return dice_bce_loss(adapter_bottleneck(*tensors), target)

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU())
    loss = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record))(
        h, residual, *weights
    )
    loss.backward()
    launches = [
        [n.kwargs["kwargs"] for n in g.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        for g in graphs
    ]
    assert [len(found) for found in launches] == [3, 3]  # adapter, sums, finish; gradient, rows, weights
    assert (
        loss.shape == ()
        and h.grad.dtype == torch.bfloat16
        and all(w.grad.dtype == torch.float32 for w in weights)
    )


def test_distributed_data_parallel(tmp_path):
    """One process of a group: gradients through the ops are reduced as any other."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = vlsm.build("clipseg", GOLDEN / "clipseg-tiny", "dense", dim=8)
        inputs = torch.randn(2, 3, 64, 64), torch.tensor([[198, 5, 6, 199], [198, 7, 199, 199]])
        target = torch.rand(2, 1, 64, 64) < 0.5
        grads = []
        for m in (model, torch.nn.parallel.DistributedDataParallel(model)):
            model.zero_grad()
            vlsm.dice_bce_loss(m(*inputs), target).backward()
            grads.append({n: p.grad.clone() for n, p in model.tuned_parameters().items()})
        for name, g in grads[0].items():
            torch.testing.assert_close(grads[1][name], g)
    finally:
        torch.distributed.destroy_process_group()


def test_both_ways_over_the_cpu_agree():
    torch.manual_seed(0)
    for density in (0.02, 0.5, 0.98):
        a, b = (boundary(torch.rand(30, 41) < density) for _ in range(2))
        p, q = a.nonzero(), b.nonzero()
        of_p, of_q = _by_pairs(p, q)
        assert torch.equal(of_p, _by_transform(p, b)) and torch.equal(of_q, _by_transform(q, a))


def test_distances_are_exact_where_float32_is_not():
    p, q = torch.zeros(2, 9000, 9001, dtype=torch.bool)
    p[0, 0], q[8999, 9000] = True, True
    squared, _ = surface_distances(p, q)
    assert squared.tolist() == [8999**2 + 9000**2] * 2


def test_distances_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="must be bool"):
        surface_distances(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="must be equal"):
        surface_distances(torch.ones(3, 3) > 0, torch.ones(3, 4) > 0)
    with pytest.raises(ValueError, match="below 32768"):
        surface_distances(torch.ones(1, 32767) > 0, torch.ones(1, 32767) > 0)


def test_choosing_kernels(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_mode", "auto")  # and back, at the end
    with pytest.raises(ValueError, match="not known"):
        use_kernels("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--kernels triton: there is no GPU"):
        use_kernels("triton")
    assert not use_kernels("auto") and not use_kernels("torch") and capsys.readouterr().err == ""
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert not dispatch.runs_triton(torch.zeros(1))
    assert use_kernels("auto") and dispatch.runs_triton(torch.zeros(1))


def test_a_gpu_where_triton_cannot_build(monkeypatch, capsys):
    """Said once, and plain torch takes over."""

    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(dispatch, "_mode", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch, "empty", fail)
    assert not use_kernels("auto") and not dispatch.runs_triton(torch.zeros(1))
    assert capsys.readouterr().err.startswith(
        "Triton cannot build a kernel here (Failed to find C compiler.); the slower"
    )
    with pytest.raises(ValueError, match="C compiler"):
        use_kernels("triton")
    monkeypatch.setattr(dispatch, "AVAILABLE", False)
    with pytest.raises(ValueError, match="pip install triton"):
        use_kernels("triton")


def test_a_gpu_without_matrix_units_for_bf16(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_mode", "auto")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match="--kernels triton: the kernels need compute capability 8.0.*T4"):
        use_kernels("triton")
    assert not use_kernels("auto") and "compute capability 8.0" in capsys.readouterr().err


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch):
    entered, launched = [], []
    monkeypatch.setattr(dispatch, "INTERPRETED", True)  # as it is, without torch's wrapper
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1")
    kernel = {(3,): lambda *args, **sizes: launched.append((args, sizes))}
    dispatch.launch(kernel, (3,), tensor, 5, BLOCK=8)
    assert entered == ["cuda:1"] and launched == [((tensor, 5), dict(BLOCK=8))]


def test_kernels_import_nothing_of_the_project():
    """Only the standard library, torch, scipy, triton and the package's own files."""
    allowed = {*sys.stdlib_module_names, "kernels", "torch", "scipy", "triton"}
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path} imports from outside its folder"
            for module in modules:
                assert module.split(".")[0] in allowed, f"{path} imports {module}"


def test_kernels_run_from_a_folder_of_their_own(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = "import torch, kernels; x = torch.ones(2, 3); print(kernels.dice_bce_loss(x, x))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_triton_everything_imports_and_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\nfrom kernels import dispatch\n"
        "assert not dispatch.AVAILABLE\n"
        "h = torch.randn(3, 8)\n"
        "kernels.adapter_bottleneck(h, h, torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8))\n"
        "print(kernels.dice_bce_loss(h, h > 0), kernels.surface_distances(h > 0, h < 0)[1])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
