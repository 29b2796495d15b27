"""Fused kernels, a file each: Triton kernel, plain-torch reference, registered op.

Imports nothing of the project.

Names are loaded when they are first asked for: Triton and torch's op registry take seconds to import.
"""

from importlib import import_module

_MODULES = dict(
    adapter_bottleneck="adapter",
    dice_bce_loss="dice_bce",
    surface_distances="boundary",
    use_kernels="dispatch",
)
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'kernels' has no attribute '{name}'")
    globals()[name] = getattr(import_module(f"kernels.{_MODULES[name]}"), name)
    return globals()[name]
