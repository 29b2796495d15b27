"""Several tuners on one base in memory: `load_many`, `model.use(name)`, batches that mix them."""

from torch import nn

from .checkpoint import check_base, load_tensors, read_metadata
from .model import VLSM, load_base, tune


def _tensor(network, name):
    parent, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(parent), leaf)


class Bank(VLSM):
    """A `VLSM` with several tuners by name, one of them active; for prediction, not for training.

    models: name -> (a VLSM on the `network`, its checkpoint's metadata, tensors that it has learnt in the place of the network's own).
    Attributes: `names`; `active`; `tuner`, `info` and `about` (the metadata), which are the active one's.
    """

    def __init__(self, network, models):
        self.names = list(models)
        first, _, _ = models[self.names[0]]
        super().__init__(network, first.tuner, first.info)
        self.tuners = nn.ModuleList(model.tuner for model, _, _ in models.values())
        self.infos = {name: (model.info, about) for name, (model, about, _) in models.items()}
        self.learnt = {name: learnt for name, (_, _, learnt) in models.items()}
        self.untuned = {key: _tensor(network, key).data for learnt in self.learnt.values() for key in learnt}
        self.active = None
        self.use(self.names[0]).requires_grad_(False).eval()

    def use(self, name):
        """Make a tuner the active one, in place; returns the model. Raises ValueError for a name that is not there."""
        if name not in self.names:
            raise ValueError(f"There is no tuner '{name}' here; known are {', '.join(self.names)}.")
        if name != self.active:
            for source, keys in ((self.untuned, self.learnt.get(self.active, ())), (self.learnt[name], self.learnt[name])):
                for key in keys:
                    here = _tensor(self.base, key)
                    source[key] = here.data = source[key].to(here.device, here.dtype)  # the model may have moved since
            self.active, self.tuner = name, self.tuners[self.names.index(name)]
            self.info, self.about = self.infos[name]
        return self

    def forward(self, pixel_values, input_ids, attention_mask=None, tuner=None):
        """As `VLSM.forward`. tuner: a name, or one for each sample; by default the active one, which stays so."""
        if tuner is None:
            return super().forward(pixel_values, input_ids, attention_mask)
        names = [tuner] * len(pixel_values) if isinstance(tuner, str) else list(tuner)
        if len(names) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} images came with {len(names)} names of tuners; give one, or one for each.")
        before, logits = self.active, None
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            mask = None if attention_mask is None else attention_mask[rows]
            part = self.use(name)(pixel_values[rows], input_ids[rows], mask)
            logits = part.new_empty(len(names), *part.shape[1:]) if logits is None else logits
            logits[rows] = part
        self.use(before)
        return logits


def load_many(checkpoints, weights=None):
    """A `Bank` of `{name: run or checkpoint}`, all tuned on one base, which is read once (from `weights`, if it has moved).

    Raises ValueError where there is none, or where one was tuned on another base.
    """
    base, models = None, {}
    if not checkpoints:
        raise ValueError("load_many wants at least one checkpoint: {name: path}.")
    for name, path in checkpoints.items():
        about = read_metadata(path)
        base = base or load_base(about["model"], weights or about["weights"], about["reference"])
        check_base(path, about, base)
        model = tune(base, about["method"], **about["options"])
        keys = [*model.tuner.base_parameters(base.network), *model.moving]
        untuned = {key: _tensor(base.network, key).data for key in keys}
        for key in keys:
            _tensor(base.network, key).data = untuned[key].clone()
        model.load_tuned(load_tensors(path))
        learnt = {key: _tensor(base.network, key).data for key in keys}
        for key in keys:
            _tensor(base.network, key).data = untuned[key]
        models[name] = model, about, learnt
    return Bank(base.network, models)
