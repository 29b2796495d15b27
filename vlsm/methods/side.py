"""Side tuning: a ladder of small layers beside the frozen image encoder, which reads its blocks' outputs.

No gradient enters the encoder, so these outputs can be cached: a later step runs the ladder and the decoder.

Source: the idea of Sung et al., "LST: Ladder Side-Tuning" (NeurIPS 2022), with layers of our own.
"""

import torch.nn.functional as F
from torch import nn

from vlsm.methods.branches import check_width
from vlsm.networks.hooks import Tuner


class Rung(nn.Module):
    """One step of the ladder: s + up(gelu(down(norm(a)) + recur(s))).

    d: width of the block's output a; dim: width of the state s. The first rung has no state to read, and so
    no `recur`.
    """

    def __init__(self, d, dim, first):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.down = nn.Linear(d, dim)
        self.recur = None if first else nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, dim)

    def forward(self, a, s):
        """Return the next state `[B, N, dim]`.

        a: the block's output `[B, N, d]`; s: the state, None at the first rung.
        """
        hidden = self.down(self.norm(a))  # [B, N, dim]
        if self.recur is None:
            return self.up(F.gelu(hidden))
        return s + self.up(F.gelu(hidden + self.recur(s)))


class SideLadder(Tuner):
    """A ladder of width `dim` over the image blocks, projected onto the activations that the decoder reads.

    At each extract layer x becomes x + project(s), where s is the state after that layer's block. The
    projections start at zero, so that nothing changes at first.
    """

    needs_ladder_blocks = True

    def __init__(self, config, dim=64, reference=False):
        super().__init__(config, reference)
        check_width(dim)
        d = config.vision.hidden_size
        self.ladder = nn.ModuleList(Rung(d, dim, not k) for k in range(len(config.ladder_blocks)))
        self.layers = sorted(set(config.extract_layers))
        self.project = nn.ModuleList(nn.Linear(dim, d) for _ in self.layers)
        for projection in self.project:
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def adapt_blocks(self, by_block):
        adapted = {}
        s = None
        for rung, (i, a) in zip(self.ladder, by_block.items()):
            s = rung(a, s)  # [B, N, dim]
            if i in self.layers:
                projection = self.project[self.layers.index(i)]
                adapted[i] = a + projection(s)  # [B, N, d]
        return by_block | adapted
