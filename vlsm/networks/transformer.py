"""The pre-norm transformer block of all networks, under the names of each network's checkpoint."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def quick_gelu(x):
    """Compute x sigmoid(1.702 x) by way of SiLU: one fused operation instead of three."""
    return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


class Names(NamedTuple):
    """What a checkpoint calls the parts of a block, which are registered in the order of `modules`.

    qkv: the projections to q, k and v, one name where they are stacked.
    """

    modules: tuple
    attention: str
    norms: tuple
    mlp: tuple
    qkv: tuple
    out: str


HUGGING_FACE = Names(
    modules=("self_attn", "layer_norm1", "mlp", "layer_norm2"),
    attention="self_attn",
    norms=("layer_norm1", "layer_norm2"),
    mlp=("fc1", "fc2"),
    qkv=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
)
OPENAI = Names(
    modules=("attn", "mlp", "ln_1", "ln_2"),
    attention="attn",
    norms=("ln_1", "ln_2"),
    mlp=("c_fc", "c_proj"),
    qkv=("in_proj",),
    out="out_proj",
)
TIMM = Names(
    modules=("norm1", "norm2", "attn", "mlp"),
    attention="attn",
    norms=("norm1", "norm2"),
    mlp=("fc1", "fc2"),
    qkv=("qkv",),
    out="proj",
)


def noise(*shape, std=0.02):
    """Return a parameter that starts as normal noise."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))


WRITTEN_OUT = 1 << 25  # scores at most that are kept for the backward pass: they take memory


def attend(q, k, v, mask=None, dropout=0.0, causal=False):
    """Return softmax(q k^T / sqrt(d)) v, `[B, heads, N, d]`, of q of that shape and k, v `[B, heads, S, d]`.

    By PyTorch's fused attention, but for training in 16 bits on a CPU, where its backward pass is slower than
    the written-out products (kernels/RESULTS.md).
    """
    low = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad
    plain = low and mask is None and not causal and not dropout
    if plain and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= WRITTEN_OUT:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def rotate(t, cos, sin):
    """Turn pairs of neighbouring channels of `[..., N, d]` by the angles, in float32."""
    t32 = t.float()
    turned = torch.stack([-t32[..., 1::2], t32[..., 0::2]], -1).flatten(-2)
    return (t32 * cos + turned * sin).type_as(t)


class Attention(nn.Module):
    """Multi-head attention with projections under given names; out_dim: width of the result."""

    def __init__(self, dim, heads, names=HUGGING_FACE, dropout=0.0, out_dim=None):
        super().__init__()
        self.heads, self.names, self.dropout = heads, names, dropout
        if names == OPENAI:  # plain parameters, as in torch's nn.MultiheadAttention
            self.in_proj_weight = noise(3 * dim, dim, std=dim**-0.5)
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        else:
            for name in names.qkv:
                setattr(self, name, nn.Linear(dim, 3 * dim // len(names.qkv)))
        setattr(self, names.out, nn.Linear(dim, out_dim or dim))

    def projection(self, name):
        """Return the linear layer of one of "q", "k", "v", "out", where these are not stacked."""
        return getattr(self, dict(zip("qkv", self.names.qkv), out=self.names.out)[name])

    def stacked(self):
        """Return the weight `[3 D, D]` and bias `[3 D]` of the projections to q, k and v."""
        if self.names == OPENAI:
            return self.in_proj_weight, self.in_proj_bias
        layers = [getattr(self, name) for name in self.names.qkv]
        if len(layers) == 1:
            return layers[0].weight, layers[0].bias
        return torch.cat([p.weight for p in layers]), torch.cat([p.bias for p in layers])

    def forward(self, query, key=None, value=None, mask=None, causal=False, deltas=None, rope=None):
        """Attend from `[B, N, D]` to itself, or to key (and value, the same unless given) `[B, S, D]`.

        mask: bool (True is seen), or added to the scores. deltas: see `Tuner.lora_deltas`. rope: cosines and
        sines `[N, d]` of a head's rotary positions.
        """
        (weight, bias), deltas = self.stacked(), deltas or {}
        if key is None:
            parts = F.linear(query, weight, bias).chunk(3, -1)
        else:
            sources = (query, key, key if value is None else value)
            parts = [F.linear(x, w, b) for x, w, b in zip(sources, weight.chunk(3), bias.chunk(3))]
        parts = [t + deltas[name](query) if name in deltas else t for name, t in zip("qkv", parts)]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)  # [B, heads, N, D/heads]
        if rope:
            q, k = (rotate(t, *rope) for t in (q, k))
        x = attend(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        x, project = x.transpose(1, 2).flatten(2), getattr(self, self.names.out)  # [B, N, D]
        return project(x) + deltas["out"](x) if "out" in deltas else project(x)


class MLP(nn.Module):
    """Two linear layers and an activation between them."""

    def __init__(self, dim, hidden, activation, names=HUGGING_FACE):
        super().__init__()
        self.activation, self.names = ACTIVATIONS[activation], names.mlp
        setattr(self, self.names[0], nn.Linear(dim, hidden))
        setattr(self, self.names[1], nn.Linear(hidden, dim))

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.names)
        return second(self.activation(first(x)))


class Block(nn.Module):
    """Pre-norm transformer layer.

    recompute: whether the backward pass computes the layer's activations again instead of keeping them.
    """

    recompute = False

    def __init__(self, dim, heads, hidden, activation, eps=1e-5, names=HUGGING_FACE):
        super().__init__()
        self.names = names
        modules = {names.attention: Attention(dim, heads, names), "mlp": MLP(dim, hidden, activation, names)}
        modules.update({name: nn.LayerNorm(dim, eps=eps) for name in names.norms})
        for name in names.modules:
            self.add_module(name, modules[name])

    def parts(self):
        """Return the attention and the two norms."""
        return (getattr(self, name) for name in (self.names.attention, *self.names.norms))

    def forward(self, x, residual_ops=(torch.add, torch.add), mask=None, causal=False, deltas=None):
        """Transform tokens `[B, N, D]`; for `residual_ops` and `deltas` see the hooks of `Tuner`."""
        values = x, residual_ops, mask, causal, deltas
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._transform, *values, use_reentrant=False)
        return self._transform(*values)

    def _transform(self, x, residual_ops, mask, causal, deltas):
        attention, norm1, norm2 = self.parts()
        add_attention, add_mlp = residual_ops
        x = add_attention(attention(norm1(x), mask=mask, causal=causal, deltas=deltas), x)
        return add_mlp(self.mlp(norm2(x)), x)

    def cross(self, x, others, mask):
        """Transform tokens `[B, Q, D]` that see `[themselves, others]`; mask `[B, heads, Q, Q+S]`."""
        attention, norm1, norm2 = self.parts()
        seen = norm1(torch.cat([x, others], 1))
        x = x + attention(seen[:, : x.shape[1]], seen, mask=mask)
        return x + self.mlp(norm2(x))


def encoder_blocks(config, names=HUGGING_FACE):
    """Return the blocks of an encoder of the sizes of an `EncoderConfig`."""
    c = config
    sizes = c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act
    return nn.ModuleList(Block(*sizes, c.layer_norm_eps, names) for _ in range(c.num_hidden_layers))


def initialise_embeddings(network):
    """Give a network's embeddings a random start."""
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def text_model(c):
    """Return CLIP's text transformer of an `EncoderConfig`, in Hugging Face's tree of names."""
    return tree(
        embeddings=tree(
            token_embedding=nn.Embedding(c.vocab_size, c.hidden_size),
            position_embedding=nn.Embedding(c.max_position_embeddings, c.hidden_size),
        ),
        encoder=tree(layers=encoder_blocks(c)),
        final_layer_norm=nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps),
    )


def tree(**children):
    """Return a module that only holds modules and parameters: what a checkpoint groups under a name."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module
