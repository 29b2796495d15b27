"""Several tuners on one base in memory: `load_many`, `model.use(name)`, batches that mix them."""

from torch import nn

from vlsm.checkpoint import check_base, read_metadata, read_tuned
from vlsm.model import VLSM, attach_tuner, load_base


def _tensor(network, name):
    parent, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(parent), leaf)


class Bank(VLSM):
    """A `VLSM` with several tuners by name, one of them active; for prediction, not for training.

    models: name -> (a VLSM on the `network`, tensors that it has learnt in the place of the network's own).
    Attributes: `names`; `active`; `tuner`, `info` and `about`, which are the active one's.
    """

    def __init__(self, network, models):
        self.names = list(models)
        first, _ = models[self.names[0]]
        super().__init__(network, first.tuner, first.info, first.about)
        self.tuners = nn.ModuleList(model.tuner for model, _ in models.values())
        self.infos = {name: (model.info, model.about) for name, (model, _) in models.items()}
        self.learnt = {name: learnt for name, (_, learnt) in models.items()}
        self.untuned = {key: _tensor(network, key).data for learnt in self.learnt.values() for key in learnt}
        self.active = None
        self.use(self.names[0]).requires_grad_(False).eval()

    def use(self, name):
        """Make a tuner the active one, in place; returns the model.

        Raises ValueError for a name that is not there.
        """
        if name not in self.names:
            raise ValueError(f"There is no tuner '{name}' here; known are {', '.join(self.names)}.")
        if name != self.active:
            self._exchange(self.untuned, self.learnt.get(self.active, ()))
            self._exchange(self.learnt[name], self.learnt[name])
            self.active, self.tuner = name, self.tuners[self.names.index(name)]
            self.info, self.about = self.infos[name]
        return self

    def _exchange(self, source, keys):
        """Put tensors of `source` in the place of the network's own, where the model is by now."""
        for key in keys:
            here = _tensor(self.base, key)
            source[key] = here.data = source[key].to(here.device, here.dtype)

    def forward(self, pixel_values, input_ids, attention_mask=None, tuner=None):
        """Do as `VLSM.forward`.

        tuner: a name, or one for each sample; by default the active one, which stays so.
        """
        if tuner is None:
            return super().forward(pixel_values, input_ids, attention_mask)
        names = [tuner] * len(pixel_values) if isinstance(tuner, str) else list(tuner)
        if len(names) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images came with {len(names)} names of tuners; give one, or one for "
                "each."
            )
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
    """Return a `Bank` of `{name: run or checkpoint}`, all tuned on one base, which is read once.

    weights: the base's folder or hub id, if it has moved. Raises ValueError where there is no checkpoint, or
    where one was tuned on another base.
    """
    base, models = None, {}
    if not checkpoints:
        raise ValueError("load_many wants at least one checkpoint: {name: path}.")
    for name, path in checkpoints.items():
        about = read_metadata(path)
        base = base or load_base(about["model"], weights or about["weights"], about["reference"])
        check_base(path, about, base)
        models[name] = _load_one(base, path, about)
    return Bank(base.network, models)


def _load_one(base, path, about):
    """Return (a checkpoint's VLSM, what it has learnt in the place of the base's tensors)."""
    model = attach_tuner(base, about["method"], about["options"], about)
    keys = [*model.tuner.trained_network_parameters(base.network), *model.updated_buffers]
    tensors = {key: _tensor(base.network, key) for key in keys}
    untuned = {key: t.data for key, t in tensors.items()}
    for key, t in tensors.items():
        t.data = untuned[key].clone()
    model.load_tuned(read_tuned(path))
    learnt = {key: t.data for key, t in tensors.items()}
    for key, t in tensors.items():
        t.data = untuned[key]
    return model, learnt
