"""The hyper-parameters that `python -m vlsm.tools.sweep` searches, for each method.

Source: Adhikari et al., "TuneVLSeg" (ACCV 2024), Table 2, for the prompt learners; the others alike.
"""

import torch

from vlsm.methods.registry import (
    METHODS,
    PromptLearner,
    check_model,
    complete_options,
    make_tuner,
    split_methods,
)

MAX_DEPTH = 11
RATES = {"lr": dict(low=1e-5, high=5e-3, log=True), "weight_decay": dict(low=1e-5, high=1e-2, log=True)}
PROJECTIONS = {"intermediate_dim": [32, 64, 96, 128], "lora_proj": [False, True]}
SPACES = {
    "cocoop": PROJECTIONS,
    "maple": PROJECTIONS,
    "shared_separate": {"shared_dim": [32, 64]},
    "shared_attention": {
        "heads": [16, 20, 32],
        "dropout": dict(low=0.1, high=0.55),
        "feed_forward": [1280, 1420],
        "norm_first": [False, True],
    },
    "dense": {"dim": [16, 32, 64, 128]},
    "shallow": {"dim": [128, 256, 512]},
    "lora": {"dim": [4, 8, 16, 32]},
    "side": {"dim": [32, 64, 128]},
}


def search_space(method, network, config, reference, given):
    """Return {option: list of choices, or interval dict(low, high, log)} of a method on a network.

    network: its class; config: its configuration. given: the method's options that are fixed. Options without
    an effect, and choices that do not fit the network, are left out. Raises ValueError for the method none,
    and for one that cannot act on the network.
    """
    check_model(method, network)
    if method == "none":
        raise ValueError("--peft none trains nothing, so there is nothing to search. Choose another method.")
    names = split_methods(method)
    space = dict(RATES)
    learners = [METHODS[name] for name in names if issubclass(METHODS[name], PromptLearner)]
    if learners:
        depths = [config.max_prompt_depth(learner.encoders, reference) for learner in learners]
        space["prompt_depth"] = dict(low=1, high=min(MAX_DEPTH, *depths))
    for name in names:
        space.update(SPACES.get(name, {}))
    if "heads" in space:
        width = config.text.hidden_size + config.vision.hidden_size
        space["heads"] = [heads for heads in space["heads"] if width % heads == 0]
        if not space["heads"]:
            del space["heads"]
    with torch.device("meta"):
        tuner = make_tuner(method, config, reference, complete_options(method, given, config))
    if learners and not any(tuner.uses_weight_decay(*item) for item in tuner.named_parameters()):
        del space["weight_decay"]
    return space
