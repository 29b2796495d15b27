"""Fused kernels, a file each: Triton kernel, plain-torch reference, registered op.

Imports nothing of the project.

Names are loaded when they are first asked for: Triton and torch's op registry take seconds to import.
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
    if name in _MODULES:
        globals()[name] = getattr(import_module(f"kernels.{_MODULES[name]}"), name)
        return globals()[name]
    if not name.startswith("_"):
        package = _installed_package()
        if package is not None:
            return getattr(package, name)
    raise AttributeError(f"module 'kernels' has no attribute '{name}'")


def _installed_package():
    """Return Hugging Face's package of the same name, where it is installed, or None.

    transformers imports names of it; run in this folder, Python finds this package first. Its modules are
    found behind ours.
    """
    if "kernels.installed" not in sys.modules:
        here = Path(__file__).parent
        elsewhere = [p for p in sys.path if Path(p).resolve() != here.parent]
        spec = PathFinder.find_spec("kernels", elsewhere)
        if spec is None or spec.origin is None:
            return None
        __path__.append(str(Path(spec.origin).parent))
        spec = spec_from_file_location("kernels.installed", spec.origin)
        sys.modules[spec.name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[spec.name])
        except BaseException:  # nothing of half a package stays
            del sys.modules[spec.name]
            __path__.pop()
            raise
    return sys.modules["kernels.installed"]
