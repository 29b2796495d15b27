"""Fused kernels, one file each: Triton kernel, plain-torch twin, registered op.

Imports nothing else of the project. Names are loaded on first use: Triton and torch's op registry take
seconds to import.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_MODULES = dict(
    adapter_bottleneck="adapter",
    dice_bce_loss="dice_bce",
    surface_distances="boundary",
    use_kernels="dispatch",
)
__all__ = list(_MODULES)


def __getattr__(name):
    """Load a function of this package on first use; other names come from Hugging Face's package."""
    if name in _MODULES:
        globals()[name] = getattr(import_module(f"kernels.{_MODULES[name]}"), name)
        return globals()[name]
    if not name.startswith("_"):
        package = _installed_package()
        if package is not None:
            return getattr(package, name)
    raise AttributeError(f"module 'kernels' has no attribute '{name}'")


def _installed_package():
    """Return Hugging Face's package of the same name if it is installed, else None.

    transformers imports names from it, but in this repository Python finds this package first. Its folder is
    added behind ours, so that its modules are found too.
    """
    if "kernels.installed" in sys.modules:
        return sys.modules["kernels.installed"]
    root = Path(__file__).parents[1]
    search_path = [folder for folder in sys.path if Path(folder).resolve() != root]
    spec = PathFinder.find_spec("kernels", search_path)
    if spec is None or spec.origin is None:
        return None
    __path__.append(str(Path(spec.origin).parent))
    spec = spec_from_file_location("kernels.installed", spec.origin)
    package = module_from_spec(spec)
    sys.modules[spec.name] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:  # a package that fails half-way must not stay in the process
        del sys.modules[spec.name]
        __path__.pop()
        raise
    return package
