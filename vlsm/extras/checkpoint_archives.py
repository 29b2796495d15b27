"""Tensors of other people's checkpoints: torch.save's files and TorchScript archives, read without running
anything that they hold.
"""

import collections
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# functions of an archive that only return a list
INERT = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class Record:
    """What stands for an object of a TorchScript archive: its attributes, and no code."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Reader(pickle.Unpickler):
    """Knows tensors, their storages and lists; classes of the archive become records; any other global is
    refused.
    """

    def __init__(self, archive, pickled):
        super().__init__(archive.open(pickled))
        self.archive, self.root = archive, pickled.removesuffix("data.pkl")

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name in INERT:
            return lambda value, *_: value
        if module.split(".")[0] == "__torch__":
            return Record
        raise pickle.UnpicklingError(f"it asks for '{module}.{name}'")

    def persistent_load(self, key):
        _, dtype, name, *_ = key
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it holds a storage of unknown kind '{dtype}'")
        values = bytearray(self.archive.read(f"{self.root}data/{name}"))
        return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _tensor(storage, offset, size, stride, *_):
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if offset < 0 or min(stride, default=0) < 0 or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("it holds a tensor that reaches beyond its storage")
    return storage.as_strided(size, stride, offset).clone()


def _named(record, prefix=""):
    """Yield (name, tensor) below a record; the name is the path of attributes that leads there."""
    for name, value in vars(record).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, Record):
            yield from _named(value, f"{prefix}{name}.")


def _torchscript(archive):
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    try:
        module = _Reader(archive, pickled).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"is a TorchScript archive that is refused: {error}. Nothing in it was run."
        ) from error
    if not isinstance(module, Record):
        raise ValueError("is a TorchScript archive without a module.")
    return dict(_named(module))


def _saved(path):
    """Return the value in a file of torch.save's, if it is made of tensors and plain containers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # of the older format, or damaged
            names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not names:
            raise ValueError(
                "is no checkpoint, or is damaged. Nothing in it was run. Is the file complete?"
            ) from error
        raise ValueError(
            f"holds more than tensors: it asks for {', '.join(names[:5])}. It is refused, and nothing in it "
            "was run. Save its state dictionary alone, where you trust it: "
            "torch.save(checkpoint['state_dict'], FILE)."
        ) from error


def read(path):
    """Return the tensors of a checkpoint by name: of safetensors, a file of torch.save's (a state dictionary,
    alone or under `state_dict` or `model`), or a TorchScript archive.

    Raises FileNotFoundError, or ValueError for what is damaged, holds no tensors or wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _torchscript(archive)
        found = _saved(path)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from error
    except Exception as error:  # zip, end-of-file, safetensors and runtime errors alike
        reason = str(error).splitlines()[0][:200] if str(error) else "no reason given"
        raise ValueError(
            f"'{path}' cannot be read ({type(error).__name__}: {reason}). Is the file complete?"
        ) from error
    if isinstance(found, dict):
        found = next(
            (found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found
        )
    if not isinstance(found, dict) or not any(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"'{path}' holds no state dictionary.")
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
