"""The gradients of a run's first step, and losses that diverge."""

import re

# Parameters whose gradient is zero at the start by construction: a key bias shifts all scores of a query
# alike, which softmax ignores; the first matrix of a LoRA update learns nothing before the second is not 0.
ZERO_AT_START = re.compile(r"k_proj\.bias$|\.(q|k|v|out)\.down\.weight$")


class Diverged(ValueError):
    """A loss that is not finite."""


def check_gradients(model):
    """Return a line on the gradients: each trained tensor needs a finite one, no frozen one has any.

    model: a `VLSM` after a backward pass. Raises ValueError if a gradient is missing, not finite, or on a
    frozen tensor.
    """
    tuned = model.tuned_parameters()
    published = model.info["reference"]  # published code trains some tensors that nothing reads
    broken, zero = [], []
    for name, parameter in tuned.items():
        gradient = parameter.grad
        if gradient is None:
            (zero if published else broken).append(name)
        elif not gradient.isfinite().all():
            broken.append(name)
        elif not gradient.any() and not ZERO_AT_START.search(name):
            zero.append(name)
    trained = {id(parameter) for parameter in tuned.values()}
    frozen = 0
    leaking = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            frozen += 1
            if parameter.grad is not None:
                leaking.append(name)
    if broken or leaking:
        raise ValueError(
            f"First step: {len(broken)} trained tensors without a finite gradient ({', '.join(broken[:3])}), "
            f"{len(leaking)} frozen ones with one ({', '.join(leaking[:3])}). Training would be wrong; "
            "please report this."
        )
    counts = f"{len(tuned) - len(zero)} of {len(tuned)} trained tensors finite and non-zero"
    line = f"gradients at the first step: {counts}, 0 of {frozen} frozen ones have any"
    if zero:
        line += f"; ZERO, so not learning yet: {', '.join(zero[:4])}{', ...' if len(zero) > 4 else ''}"
    return line
