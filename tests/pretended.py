"""A pretended GPU: `python -m tests.pretended BYTES OPTIONS OF TRAIN.PY` trains two epochs on a GPU with so much
memory, and prints the places where the host waits for it in the second epoch's steps, as JSON.

Tensors "on cuda" are CPU tensors with CUDA's dispatch keys, so that autocast, `is_cuda` and the choice of fused
code follow CUDA's rules. Each operation on them passes through `run_on_cpu`, which notes what makes a host wait.
It needs the CUDA build of torch, no GPU, and the library of `build_driver` in LD_PRELOAD.
"""

import contextlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from vlsm.data import cache

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
STAGED = 64 << 10  # bytes from memory that is not pinned that the driver sends without waiting
# what torch's C++ asks the driver, even if no kernel is launched
DRIVER = """
extern "C" int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
extern "C" int cudaGetDevice(int* device) { *device = 0; return 0; }
extern "C" int cudaSetDevice(int) { return 0; }
extern "C" int cudaDeviceGetStreamPriorityRange(int* least, int* most) { *least = *most = 0; return 0; }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *active = 0; return 0; }
"""
# operations whose result's size, or value, the host must know
READ_BY_THE_HOST = {
    "_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero", "repeat_interleave", "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MIXING = {*INDEXING, "copy_", "_to_copy"}  # take tensors of several devices
waits = []  # the places, in order


def build_driver(folder):
    """Compile DRIVER into a folder; returns the library's file."""
    library = Path(folder) / "libcuda.so.1"
    command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return library


def note_wait(reason):
    """Add the innermost line of the project, and its function, to `waits`."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file != Path(__file__):
            waits.append(f"{file.relative_to(ROOT)}:{frame.lineno} {frame.name}: {reason}")
            return
    waits.append(f"torch: {reason}")


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on the GPU."""

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_subclass(
            cls, values, False, dispatch_device=True, device_for_backend_keys=GPU
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, kinds, args=(), kwargs=None):
        return run_on_cpu(operation, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)


class GPUMode(TorchDispatchMode):
    """Sends operations without tensors, such as `torch.zeros(2, device="cuda")`, through `run_on_cpu`, too."""

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        return run_on_cpu(operation, args, kwargs or {})


def run_on_cpu(operation, args, kwargs):
    """Run an operation on the tensors' values, after noting whether the host would wait for it."""
    if operation is torch.ops.prim.device.default:
        return GPU
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_gpu = [t for t in tensors if isinstance(t, OnGPU)]
    device = torch.device(kwargs.get("device") or (GPU if on_gpu else "cpu"))
    if not on_gpu and device.type == "cpu":
        return operation(*args, **kwargs)
    name = operation._schema.name.split("::")[1]
    on_host = [t for t in tensors if not isinstance(t, OnGPU)]
    note_waits(name, args, kwargs, device, on_host)
    if on_gpu and name not in MIXING and any(t.dim() for t in on_host):
        raise RuntimeError(f"{operation}: tensors on the GPU and on the CPU")
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(values_of, (args, kwargs))
    results = operation(*args, **kwargs)
    if device.type == "cpu":
        return results
    known = {id(values_of(t)): t for t in tensors}  # an operation in place returns its argument

    def place(result):
        if not isinstance(result, torch.Tensor):
            return result
        return known[id(result)] if id(result) in known else OnGPU(result)

    return tree_map(place, results)


def values_of(t):
    return t.values if isinstance(t, OnGPU) else t


def note_waits(name, args, kwargs, device, on_host):
    """Note the waits of an operation, as torch's CUDA code has them."""
    sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
    if name in READ_BY_THE_HOST and not sized:
        note_wait(name)
    if name in INDEXING:
        places = [t for t in args[1] if t is not None]
        if any(t.dtype in (torch.bool, torch.uint8) for t in places):
            note_wait(f"{name} by a mask")
        if any(not isinstance(t, OnGPU) for t in places):
            note_wait(f"{name} by indices on the CPU")
    if name == "_to_copy":
        to_host = device.type == "cpu"
        non_blocking = kwargs.get("non_blocking")
    elif name == "copy_":
        to_host = bool(on_host) and args[0] is on_host[0]
        non_blocking = len(args) > 2 and args[2]
    else:
        return
    staged = to_host or all(t.nbytes <= STAGED or hasattr(t, "pinned") for t in on_host)
    if (on_host or to_host) and not (non_blocking and staged):
        note_wait("a copy to the CPU" if to_host else "a copy from the CPU")


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Run the attention's formula, as torch chooses its kernel by asking the driver."""
    if torch.is_autocast_enabled("cuda") and isinstance(q, OnGPU):
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
    formula = torch.ops.aten._scaled_dot_product_attention_math
    return formula(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


def pin_memory(tensor, device=None):
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


class Event:
    """torch.cuda.Event; whoever waits for it is noted."""

    def __init__(self, **options):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        note_wait("an event")


@contextlib.contextmanager
def pretend_gpu(memory):
    """Inside, torch has one GPU with so many bytes of memory."""
    properties = SimpleNamespace(name="pretended GPU", shared_memory_per_block_optin=227 << 10)
    torch._C._ensureCUDADeviceGuardSet()
    make_tensor = torch.tensor

    def tensor(data, *, device=None, **options):  # torch's own copies inside, where no mode sees it
        made = make_tensor(data, **options)
        return made if device is None else made.to(device)

    replaced = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "set_device": lambda device: None,
        "current_device": lambda: 0, "device_count": lambda: 1, "synchronize": lambda *a: note_wait("synchronize"),
        "get_device_properties": lambda *a: properties, "get_device_name": lambda *a: properties.name,
        "get_device_capability": lambda *a: (9, 0), "mem_get_info": lambda *a: (memory, memory),
        "Event": Event, "current_stream": lambda *a: None,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8), "is_bf16_supported": lambda **how: True,
        "max_memory_allocated": lambda *a: memory // 2, "reset_peak_memory_stats": lambda *a: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for owner, name, replacement in (
            (torch, "tensor", tensor),
            (torch.Tensor, "pin_memory", pin_memory),
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (_foreach_utils, "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, OnGPU]),
            (
                cache,
                "prefetch",
                lambda read, batches: ((b, read(b)) for b in batches),
            ),  # modes are a thread's own
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` keeps a tensor's kind
        stack.enter_context(GPUMode())
        yield


def main(memory, options):
    """Train, and print the waits of the last epoch's steps."""
    real_epoch = train.train_epoch
    in_steps = []

    def train_epoch(*args):
        waits.clear()
        result = real_epoch(*args)
        in_steps[:] = waits
        return result

    fixed = "--device cuda --kernels torch --compile off --epochs 2 --batch-size 4 --limit-train 0.05"
    with pretend_gpu(memory), mock.patch.object(train, "train_epoch", train_epoch):
        with mock.patch.object(train, "validate", lambda *args: (0.5, 0.5, 0.5, 0.0)):
            train.main([*options, *fixed.split()])
    print(json.dumps(in_steps))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
