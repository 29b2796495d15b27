"""Dense adapters whose width grows with depth, the successor of VLSM-Adapter's.

Source: arXiv 2512.13855 (WACV 2026).
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlsm.methods.adapters import DenseAdapters


class TelescopicAdapter(nn.Module):
    """x + scale * up(dropout(silu(norm(down(x))))), without biases; the learnt scale starts at 0.1."""

    def __init__(self, d, dim):
        super().__init__()
        self.down = nn.Linear(d, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, d, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x, residual=None):
        """Return the adapted x `[..., d]`, plus `residual` if it is given."""
        hidden = F.dropout(F.silu(self.norm(self.down(x))), 0.1, self.training)
        out = x + self.scale * self.up(hidden)
        return out if residual is None else out + residual


class TelescopicAdapters(DenseAdapters):
    """Dense adapters whose width grows with depth: in the vision encoder 8 to 32, in the last three text
    blocks and on the conditional embedding `dim`.

    dims: the widths of the vision blocks (default: the published nine, of another number the nearest).
    """

    adapter_class = TelescopicAdapter
    WIDTHS = (8, 8, 10, 14, 17, 21, 24, 28, 32)

    def __init__(self, config, branches="vlc", dim=16, dims=None, blocks=None, reference=False):
        super().__init__(config, branches, dim, dims, blocks, reference)

    def default_blocks(self, encoder, config):
        if encoder == "v":
            return super().default_blocks(encoder, config)
        layers = config.text.num_hidden_layers
        return range(max(0, layers - 3), layers)

    def cond_width(self, dim):
        return dim

    def widths(self, encoder, count, dim, dims):
        if encoder == "l":
            return [dim] * count
        if not dims:
            step = (len(self.WIDTHS) - 1) / max(count - 1, 1)
            dims = [self.WIDTHS[round(k * step)] for k in range(count)]
        return super().widths(encoder, count, dim, dims)
