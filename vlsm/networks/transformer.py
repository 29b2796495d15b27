"""The pre-norm transformer block of all networks, its attention and MLP; names are Hugging Face CLIP's."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlsm.system.schema import NUMBER, SWITCH, TEXT, field


def quick_gelu(x):
    """Compute x sigmoid(1.702 x) by way of SiLU: one fused operation instead of three."""
    return F.silu(1.702 * x).mul_(1 / 1.702)  # in place: another tensor of this size is slow to allocate


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}
WRITTEN_OUT = 1 << 25  # largest score tensor that is materialised, in entries


def attend(q, k, v, mask=None, dropout=0.0, causal=False):
    """Compute softmax(q k^T / sqrt(d)) v: `[B, heads, N, d]`, twice `[B, heads, S, d]` -> `[B, heads, N, d]`.

    By PyTorch's fused attention, except for training in 16 bits on a CPU: its backward pass is slower there
    than that of the written-out products (kernels/RESULTS.md).
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    trained_on_cpu = q.device.type == "cpu" and q.requires_grad
    plain = mask is None and not causal and not dropout
    if half and trained_on_cpu and plain:
        B, heads, N, d = q.shape
        if B * heads * N * k.shape[2] <= WRITTEN_OUT:
            scores = q * d**-0.5 @ k.transpose(2, 3)  # [B, heads, N, S]
            return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def rotate(t, cos, sin):
    """Turn pairs of neighbouring channels of `[..., N, d]` by the angles, in float32."""
    t32 = t.float()
    even = t32[..., 0::2]
    odd = t32[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (t32 * cos + turned * sin).type_as(t)


def linear_of(weight):
    """Build a linear layer of a weight `[out, in]`, with a bias of zeros."""
    out_width, in_width = weight.shape
    layer = nn.Linear(in_width, out_width, device="meta")  # draws no random numbers
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(weight.new_zeros(out_width))
    return layer


class Attention(nn.Module):
    """Multi-head attention.

    out_dim: width of the result, if it is not `dim`. normal_start: start q, k and v from one normal draw of
    deviation dim^-0.5, as OpenAI's CLIP does.
    """

    def __init__(self, dim, heads, dropout=0.0, out_dim=None, normal_start=False):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        if normal_start:
            stacked = torch.empty(3 * dim, dim).normal_(std=dim**-0.5)
            layers = [linear_of(weight.clone()) for weight in stacked.chunk(3)]
        else:
            layers = [nn.Linear(dim, dim) for _ in "qkv"]
        self.q_proj, self.k_proj, self.v_proj = layers
        self.out_proj = nn.Linear(dim, out_dim or dim)

    def forward(self, query, key=None, value=None, mask=None, causal=False, deltas=None, rope=None):
        """Attend from `[B, N, D]` to itself, or to key (and value, the same unless given) `[B, S, D]`.

        Returns `[B, N, D]`. mask: bool (True is seen), or added to the scores. deltas: see
        `Tuner.lora_deltas`. rope: cosines and sines `[N, d]` of a head's rotary positions.
        """
        deltas = deltas or {}
        if key is None:
            projected = self.project_together(query)
        else:
            value = key if value is None else value
            projected = [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
        heads = []
        for name, t in zip("qkv", projected):
            if name in deltas:
                t = t + deltas[name](query)
            heads.append(t.unflatten(-1, (self.heads, -1)).transpose(1, 2))  # [B, heads, N, d]
        q, k, v = heads
        if rope:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        x = attend(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        x = x.transpose(1, 2).flatten(2)  # [B, N, D]
        out = self.out_proj(x)
        return out + deltas["out"](x) if "out" in deltas else out

    def project_together(self, x):
        """Return q, k and v of tokens `[B, N, D]`, by one matrix product."""
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        return F.linear(x, weight, bias).chunk(3, -1)


class MLP(nn.Module):
    """Two linear layers and an activation between them."""

    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))  # [B, N, D]


class Block(nn.Module):
    """Pre-norm transformer layer.

    recompute: whether the backward pass computes the layer's activations again instead of keeping them.
    """

    recompute = False

    def __init__(self, dim, heads, hidden, activation, eps=1e-5, normal_start=False):
        super().__init__()
        self.self_attn = Attention(dim, heads, normal_start=normal_start)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden, activation)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x, residual_ops=(torch.add, torch.add), mask=None, causal=False, deltas=None):
        """Transform tokens `[B, N, D]`; for `residual_ops` and `deltas` see the hooks of `Tuner`."""
        inputs = (x, residual_ops, mask, causal, deltas)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._transform, *inputs, use_reentrant=False)
        return self._transform(*inputs)

    def _transform(self, x, residual_ops, mask, causal, deltas):
        add_attention, add_mlp = residual_ops
        attended = self.self_attn(self.layer_norm1(x), mask=mask, causal=causal, deltas=deltas)
        x = add_attention(attended, x)  # [B, N, D]
        return add_mlp(self.mlp(self.layer_norm2(x)), x)

    def cross(self, x, others, mask):
        """Transform tokens `[B, Q, D]` that see `[themselves, others]`; mask `[B, heads, Q, Q+S]`."""
        seen = self.layer_norm1(torch.cat([x, others], 1))  # [B, Q+S, D]
        queries = seen[:, : x.shape[1]]
        x = x + self.self_attn(queries, seen, mask=mask)
        return x + self.mlp(self.layer_norm2(x))


def encoder_blocks(config, normal_start=False):
    """Return the blocks of an encoder of the sizes of an `EncoderConfig`."""
    c = config
    sizes = (c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps)
    return nn.ModuleList(Block(*sizes, normal_start) for _ in range(c.num_hidden_layers))


# Tokens


def to_tokens(x):
    """Turn a map into tokens by rows: `[B, D, h, w]` -> `[B, h*w, D]`."""
    return x.flatten(2).transpose(1, 2)


def to_map(x, grid):
    """Turn tokens back into a map: `[B, h*w, D]` -> `[B, D, h, w]`; grid: (h, w)."""
    return x.transpose(1, 2).unflatten(2, grid)


def tokens_at(x, index):
    """Return the token at an index `[B]` of each row: `[B, S, ...]` -> `[B, ...]`."""
    rows = torch.arange(x.shape[0], device=index.device)
    return x[rows, index]


def resize_positions(weight, h, w):
    """Return position embeddings `[h*w, D]` for a grid, resized bicubically from `[side*side, D]`."""
    side = round(len(weight) ** 0.5)
    if (h, w) == (side, side):
        return weight
    grid = weight.T.reshape(1, -1, side, side)  # [1, D, side, side]
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T


def patch_tokens(patches, class_embedding, position_embedding):
    """Return tokens `[B, 1+h*w, D]` of patches `[B, D, h, w]`: class token, then patches by rows."""
    B, D, h, w = patches.shape
    class_token = class_embedding.to(patches.dtype).expand(B, 1, D)
    x = torch.cat([class_token, to_tokens(patches)], 1)  # [B, 1+h*w, D]
    patch_positions = resize_positions(position_embedding[1:], h, w)
    return x + torch.cat([position_embedding[:1], patch_positions])


def insert_context(x, at, context, replace=0):
    """Insert vectors `[n, D]` or `[B, n, D]` into tokens `[B, S, D]`, in place of `replace` tokens there."""
    context = context.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], context, x[:, at + replace :]], 1)


def repeat_rows(x, times):
    """Repeat each row of a tensor, or None: `[B, ...]` -> `[B * times, ...]`."""
    return x if x is None or times == 1 else x.repeat_interleave(times, 0)


def unique_rows(input_ids, attention_mask):
    """Drop repeated prompts. Returns (input_ids `[U, T]`, attention_mask or None, row `[B]` among the U)."""
    if attention_mask is None:
        input_ids, row = torch.unique(input_ids, dim=0, return_inverse=True)
        return input_ids, None, row
    pairs = torch.stack([input_ids, attention_mask.to(input_ids)], -1)  # [B, T, 2]
    pairs, row = torch.unique(pairs, dim=0, return_inverse=True)
    return *pairs.unbind(-1), row


def drop_padding(input_ids, attention_mask, end):
    """Cut prompts `[U, T]` after the last end token (index `[U]`). Returns (input_ids, attention_mask).

    The attention is causal, so tokens after the end cannot reach it. A mask stays only if it hides a token
    before the end.
    """
    T = int(end.max()) + 1
    input_ids = input_ids[:, :T]
    if attention_mask is not None:
        attention_mask = attention_mask[:, :T]
        up_to_end = torch.arange(T, device=end.device) <= end[:, None]  # [U, T]
        if attention_mask[up_to_end].all():
            attention_mask = None
    return input_ids, attention_mask


def fit_window(input_ids, seen, end, limit):
    """Cut prompts to `limit` tokens: the last words go, the end token stays.

    Returns (input_ids, seen, end).
    """
    last = tokens_at(input_ids, end)[:, None]  # [B, 1]
    input_ids = torch.cat([input_ids[:, : limit - 1], last], 1)
    if seen is not None:
        last = tokens_at(seen, end)[:, None]
        seen = torch.cat([seen[:, : limit - 1], last], 1)
    return input_ids, seen, end.clamp(max=limit - 1)


# Modules that checkpoints name


def noise(*shape, std=0.02):
    """Return a parameter that starts as normal noise."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))


def tree(**children):
    """Group modules and parameters under names, as a checkpoint does; the module has no forward pass."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


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


class TextEncoder(NamedTuple):
    """The parts of a network's text encoder, under one set of names."""

    tokens: nn.Embedding
    positions: torch.Tensor
    blocks: nn.ModuleList

    @classmethod
    def of(cls, text):
        """Return the parts of a `text_model`."""
        embeddings = text.embeddings
        return cls(embeddings.token_embedding, embeddings.position_embedding.weight, text.encoder.layers)


def initialise_embeddings(network):
    """Give a network's embeddings a random start."""
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


# Sizes


MOST = dict(hidden_size=1 << 16, num_hidden_layers=1000, image_size=1 << 13, patch_size=1 << 10)
VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
# Type of a field -> (type of its value in config.json, in words)
FIELD_TYPES = {
    int: (int, "a whole number"),
    float: NUMBER,
    bool: SWITCH,
    str: TEXT,
    tuple: ([int], "a list of whole numbers"),
}


def select_fields(config_class, values, part=None):
    """Return those of the `values` (a dictionary) that are fields of a dataclass and not None.

    part: the key of `config.json` that holds the values. Raises ValueError for a value of another type than
    the field's.
    """
    content, keys = ({part: values}, [part]) if part else (values, [])
    selected = {}
    for f in fields(config_class):
        value = values.get(f.name)
        if value is not None:
            kind, words = FIELD_TYPES.get(f.type, (object, ""))
            selected[f.name] = field("config.json", content, *keys, f.name, kind=kind, words=words)
    return selected


def rename_keys(values, names):
    """Return {ours: value} of the keys {theirs: ours} in `names` that the dictionary `values` has."""
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a CLIP encoder; the defaults are those that `config.json` leaves out (text encoder)."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    @classmethod
    def from_dict(cls, values, name):
        """Read the part `name` of a `config.json`. Raises ValueError for sizes that cannot work."""
        config = cls(**select_fields(cls, values, name))
        for f in fields(cls):
            value = getattr(config, f.name)
            most = MOST.get(f.name, 1 << 20)
            if f.type is not str and not (value <= most and (value > 0 or f.name == "eos_token_id")):
                raise ValueError(f"{name}.{f.name} is {value!r}; give a number of at most {most}.")
        heads = config.num_attention_heads
        width = config.hidden_size
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"{name}.hidden_act is '{config.hidden_act}'; known are {known}.")
        if width % heads:
            raise ValueError(f"{name}: hidden_size {width} is no multiple of {heads} heads.")
        return config
