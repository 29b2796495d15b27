"""Fine-tuning of vision-language segmentation models with few trained parameters.

Modules are imported on first use of a name, so that `import vlsm` is quick.
"""

from importlib import import_module

_HOMES = dict(  # public name -> its module
    METHODS="vlsm.methods.registry",
    Tuner="vlsm.networks.hooks",
    VLSM="vlsm.model",
    build="vlsm.model",
    dice_bce_loss="kernels",
    load="vlsm.checkpoint",
)
__all__ = [*_HOMES, "metrics"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module 'vlsm' has no attribute '{name}'")
    return import_module("vlsm.metrics") if name == "metrics" else getattr(import_module(_HOMES[name]), name)


def __dir__():
    return __all__
