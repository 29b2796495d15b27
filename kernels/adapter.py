"""The adapter's bottleneck with its residual additions, in one pass: VLSM-Adapter, Eq. 1.

    a   = relu(h W1' + b1)                       [N, r]
    out = residual + h + relu(a W2' + b2)        [N, d]

for h, residual `[N, d]`, W1 `[r, d]`, W2 `[d, r]` as `nn.Linear` holds them. Eager torch writes five tensors
of N x d on the way and reads as many again; the kernel reads h and residual and writes out. Backward, with g
the gradient of out:

    dz2 = g where a W2' + b2 > 0                 dz1 = (dz2 W2) where a > 0
    dh  = g + dz1 W1                             dresidual = g
    dW1 = dz1' h,  db1 = sum dz1                 dW2 = dz2' a,  db2 = sum dz2

`a` is saved by the forward pass (r/d of h: a twelfth at r 64, d 768); a W2' + b2 is recomputed. Bytes that
must move, for elements of e bytes: forward 3 N d e; backward 3 N d e (g and h in, dh out), of which g is read
a second time for the weights' gradient. Sums over rows go through partial sums in a fixed order, so that
results are the same in every run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from .dispatch import dot_precision, launch, runs_triton, tl, triton


def adapter_torch(h, residual, down_weight, down_bias, up_weight, up_bias):
    """Compute `adapter_bottleneck` in plain torch, as eager code writes it; the arguments are the same."""
    a = F.linear(h, down_weight, down_bias).relu()
    out = h + F.linear(a, up_weight, up_bias).relu()
    if residual is None:
        return out
    return residual + out


@triton.jit
def _load(base, rows, cols, stride, row_end: tl.constexpr, col_end: tl.constexpr, n_rows, n_cols):
    """Load a tile of a row-major matrix. `row_end` and `col_end` say that the tile may reach beyond the last
    row or column; only then is a mask needed.

    `base` points to the block's first row, by a 64-bit step; within a block 32 bits are enough, at half the
    registers.
    """
    pointers = base + rows[:, None] * stride + cols[None, :]
    row_mask = (rows < n_rows)[:, None]
    col_mask = (cols < n_cols)[None, :]
    if row_end and col_end:
        return tl.load(pointers, mask=row_mask & col_mask, other=0.0)
    if row_end:
        return tl.load(pointers, mask=row_mask, other=0.0)
    if col_end:
        return tl.load(pointers, mask=col_mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(base, values, rows, cols, stride, n_rows, n_cols):
    """Write a tile where `_load` would read it."""
    pointers = base + rows[:, None] * stride + cols[None, :]
    row_mask = (rows < n_rows)[:, None]
    col_mask = (cols < n_cols)[None, :]
    tl.store(pointers, values, mask=row_mask & col_mask)


@triton.jit
def _vector(base, at, size):
    """Load the entries `at` of a bias, in float32."""
    return tl.load(base + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    h, residual, w1, b1, w2, b2, out, hidden, N,
    D: tl.constexpr, R: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one block of rows in each program; the second read of h comes from the L2 cache."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    rows = tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_R)
    odd_d: tl.constexpr = D % BLOCK_D != 0
    odd_r: tl.constexpr = R != BLOCK_R
    z = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = _load(h + first * D, rows, cols, D, True, odd_d, n, D)
        w = _load(w1, units, cols, D, odd_r, odd_d, R, D)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    z += _vector(b1, units, R)[None, :]
    a = tl.maximum(z, 0.0).to(h.dtype.element_ty)
    if KEEP:
        _store(hidden + first * R, a, rows, units, R, n, R)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        w = _load(w2, cols, units, R, odd_d, odd_r, D, R)
        z2 = tl.dot(a, tl.trans(w), input_precision=PRECISION) + _vector(b2, cols, D)[None, :]
        y = tl.maximum(z2, 0.0) + _load(h + first * D, rows, cols, D, True, odd_d, n, D).to(tl.float32)
        if HAS_RESIDUAL:
            y += _load(residual + first * D, rows, cols, D, True, odd_d, n, D).to(tl.float32)
        _store(out + first * D, y, rows, cols, D, n, D)


@triton.jit
def backward_rows_kernel(
    g, hidden, w1, w2, b2, dh, dz1, N,
    D: tl.constexpr, R: tl.constexpr, WITH_H: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dz1 and dh of one block of rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    rows = tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_R)
    odd_d: tl.constexpr = D % BLOCK_D != 0
    odd_r: tl.constexpr = R != BLOCK_R
    a = _load(hidden + first * R, rows, units, R, True, odd_r, n, R)
    dz = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        w = _load(w2, cols, units, R, odd_d, odd_r, D, R)
        z2 = tl.dot(a, tl.trans(w), input_precision=PRECISION) + _vector(b2, cols, D)[None, :]
        grad = _load(g + first * D, rows, cols, D, True, odd_d, n, D)
        dz2 = tl.where(z2 > 0, grad.to(tl.float32), 0.0).to(a.dtype)
        dz = tl.dot(dz2, w, dz, input_precision=PRECISION)
    d = tl.where(a > 0, dz, 0.0).to(a.dtype)
    if WITH_WEIGHTS:
        _store(dz1 + first * R, d, rows, units, R, n, R)
    if WITH_H:
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            w = _load(w1, units, cols, D, odd_r, odd_d, R, D)
            y = tl.dot(d, w, input_precision=PRECISION)
            y += _load(g + first * D, rows, cols, D, True, odd_d, n, D).to(tl.float32)
            _store(dh + first * D, y, rows, cols, D, n, D)


@triton.jit
def backward_weights_kernel(
    g, h, hidden, dz1, w2, b2, partial, N, rows_each,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a block of columns over `rows_each` rows, into a row `[dW1 | db1 | dW2 | db2]` of
    `partial`.
    """
    group = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    units = tl.arange(0, BLOCK_R)
    odd_d: tl.constexpr = D % BLOCK_D != 0
    odd_r: tl.constexpr = R != BLOCK_R
    w = _load(w2, cols, units, R, odd_d, odd_r, D, R)
    bias = _vector(b2, cols, D)
    dw1 = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    dw2 = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    db1 = tl.zeros([BLOCK_R], tl.float32)
    db2 = tl.zeros([BLOCK_D], tl.float32)
    rows = tl.arange(0, BLOCK_N)
    for start in range(0, rows_each, BLOCK_N):
        first = group * rows_each + start
        n = tl.maximum(tl.minimum(N - first, BLOCK_N), 0).to(tl.int32)
        a = _load(hidden + first * R, rows, units, R, True, odd_r, n, R)
        d = _load(dz1 + first * R, rows, units, R, True, odd_r, n, R)
        x = _load(h + first * D, rows, cols, D, True, odd_d, n, D)
        grad = _load(g + first * D, rows, cols, D, True, odd_d, n, D)
        z2 = tl.dot(a, tl.trans(w), input_precision=PRECISION) + bias[None, :]
        dz2 = tl.where(z2 > 0, grad.to(tl.float32), 0.0)
        db1 += tl.sum(d.to(tl.float32), 0)
        db2 += tl.sum(dz2, 0)
        dw1 = tl.dot(tl.trans(x), d, dw1, input_precision=PRECISION)
        dw2 = tl.dot(tl.trans(dz2.to(a.dtype)), a, dw2, input_precision=PRECISION)
    base = partial + group * (2 * D * R + D + R)
    _store(base, tl.trans(dw1), units, cols, D, R, D)
    if tl.program_id(0) == 0:
        tl.store(base + D * R + units, db1, mask=units < R)
    _store(base + D * R + R, dw2, cols, units, R, D, R)
    tl.store(base + 2 * D * R + R + cols, db2, mask=cols < D)


# Launch sizes by (bytes per element, r rounded up): rows, columns, warps and stages of the three kernels. A
# table instead of auto-tuning, whose first calls take seconds. No entry spills a register, and all but the
# last need at most 99 KiB of shared memory (tests/kernels/test_ahead_of_time.py).
KERNELS = ("forward", "rows", "weights")
BLOCKS = {
    (2, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
    (2, 32): ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3)),
    (2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
    (2, 128): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    (2, 256): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (2, 512): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    (4, 16): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (4, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (4, 64): ((32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2)),
    (4, 128): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    (4, 256): ((32, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)),
    (4, 512): ((16, 16, 8, 1), (16, 16, 16, 1), (16, 16, 8, 1)),
}
SHARED_MEMORY = {(4, 512): 132096}  # bytes, where it is more than every GPU of compute capability 8 or 9 has
PROGRAMS = 264  # of the weights' gradient: two waves on a GPU of 132 processors


def _padded(r):
    """Return the size of a block that holds `r` units: a power of two, at least 16, as `tl.dot` needs."""
    return max(16, triton.next_power_of_2(r))


def blocks(kernel, r, element_size):
    """Return the launch sizes of one of `KERNELS` for a bottleneck of `r` units, as keywords."""
    block_r = _padded(r)
    row = BLOCKS[element_size, block_r]
    n, d, warps, stages = row[KERNELS.index(kernel)]
    return dict(BLOCK_N=n, BLOCK_D=d, BLOCK_R=block_r, num_warps=warps, num_stages=stages)


@torch.compiler.assume_constant_result
def _shared_memory(device):
    """Return the bytes of shared memory that a program may request on this GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _runs_kernels(h, r):
    """Return whether the kernels can process rows `h` with a bottleneck of `r` units; else `adapter_torch`
    does.
    """
    if not runs_triton(h):
        return False
    key = (h.element_size(), _padded(r))
    if key in SHARED_MEMORY and h.is_cuda:
        return _shared_memory(h.device) >= SHARED_MEMORY[key]
    return key in BLOCKS


@triton_op("vlsm::adapter_bottleneck", mutates_args=())
def _forward(
    h: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out `[N, d]`, a `[N, r]`) of contiguous `h`, `residual` `[N, d]`; a is empty unless `keep`."""
    n, d = h.shape
    r = len(down_weight)
    dtype = h.dtype
    residual_or_h = h  # the kernel needs a pointer; without a residual it does not read it
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
        residual_or_h = residual
    out = torch.empty_like(h, dtype=dtype)
    a = h.new_empty((n, r) if keep else 0)
    sizes = blocks("forward", r, h.element_size())
    launch(
        forward_kernel, (triton.cdiv(n, sizes["BLOCK_N"]),),
        h, residual_or_h, down_weight.to(h.dtype), down_bias, up_weight.to(h.dtype), up_bias, out, a, n,
        D=d, R=r, HAS_RESIDUAL=residual is not None, KEEP=keep, PRECISION=dot_precision(), **sizes,
    )  # fmt: skip
    return out, a


@triton_op("vlsm::adapter_bottleneck_backward", mutates_args=())
def _backward(
    g: Tensor,
    h: Tensor,
    a: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    with_h: bool,
    with_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dh `[N, d]`, `[dW1 | db1 | dW2 | db2]` flat and float32); either is empty unless requested."""
    n, d = h.shape
    r = len(down_weight)
    w1 = down_weight.to(h.dtype)
    w2 = up_weight.to(h.dtype)
    dh = h.new_empty(h.shape if with_h else 0)
    dz1 = h.new_empty(a.shape if with_weights else 0)
    sizes = blocks("rows", r, h.element_size())
    launch(
        backward_rows_kernel, (triton.cdiv(n, sizes["BLOCK_N"]),),
        g, a, w1, w2, up_bias, dh, dz1, n,
        D=d, R=r, WITH_H=with_h, WITH_WEIGHTS=with_weights, PRECISION=dot_precision(),
        **sizes,
    )  # fmt: skip
    if not with_weights:
        return dh, down_weight.new_empty(0)
    sizes = blocks("weights", r, h.element_size())
    block_n = sizes["BLOCK_N"]
    columns = triton.cdiv(d, sizes["BLOCK_D"])
    # of rows: at least four blocks in each. Python's min and max would tie a compiled graph to one side of
    # the limit, and a size that may be 1 to that value; a second group without rows adds zeros
    groups = torch.sym_max(2, torch.sym_min(triton.cdiv(n, 4 * block_n), PROGRAMS // columns))
    blocks_each = triton.cdiv(triton.cdiv(n, groups), block_n)
    rows_each = blocks_each * block_n
    partial = torch.empty(groups, 2 * d * r + d + r, dtype=torch.float32, device=h.device)
    launch(
        backward_weights_kernel, (columns, groups),
        g, h, a, dz1, w2, up_bias, partial, n, rows_each,
        D=d, R=r, PRECISION=dot_precision(), **sizes,
    )  # fmt: skip
    return dh, partial.sum(0)


def _save_for_backward(ctx, inputs, output):
    """Keep for `_gradients` the tensors that the backward kernels read."""
    h, _, down_weight, _, up_weight, up_bias, _ = inputs
    _, a = output
    ctx.save_for_backward(h, a, down_weight, up_weight, up_bias)
    ctx.set_materialize_grads(False)


def _gradients(ctx, g, _):
    """Return the gradients of `_forward`'s arguments, None for those that do not need one."""
    if g is None:  # nothing depends on the result
        return (None,) * 7
    h, a, down_weight, up_weight, up_bias = ctx.saved_tensors
    with_h = ctx.needs_input_grad[0]
    with_residual = ctx.needs_input_grad[1]
    with_weights = any(ctx.needs_input_grad[2:6])
    dh = dw1 = db1 = dw2 = db2 = None
    if with_h or with_weights:
        dh, flat = _backward(g.contiguous(), h, a, down_weight, up_weight, up_bias, with_h, with_weights)
    if with_weights:
        r, d = down_weight.shape
        dw1, db1, dw2, db2 = flat.split([r * d, r, d * r, d])
        dw1 = dw1.view(r, d)
        dw2 = dw2.view(d, r)
    return dh if with_h else None, g if with_residual else None, dw1, db1, dw2, db2, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def adapter_bottleneck(h, residual, down_weight, down_bias, up_weight, up_bias):
    """Compute `residual + h + relu(relu(h W1' + b1) W2' + b2)`, without the first term where `residual` is
    None.

    h, residual: `[..., d]`; weights as `nn.Linear` holds them, `[r, d]`, `[r]`, `[d, r]`, `[d]`. Under
    autocast h takes the autocast dtype, as in an `nn.Linear`. Products are computed in h's dtype, sums and
    the weights' gradients in float32. The result has the wider dtype of h and residual. Raises ValueError
    where shapes do not fit.
    """
    r, d = down_weight.shape
    residual_shape = h.shape if residual is None else residual.shape
    if h.shape[-1] != d or residual_shape != h.shape or up_weight.shape != (d, r):
        raise ValueError(
            f"Shapes do not fit together: h {list(h.shape)}, residual {list(residual_shape)}, weights "
            f"{list(down_weight.shape)} and {list(up_weight.shape)}."
        )
    device_type = h.device.type
    if torch.is_autocast_enabled(device_type) and h.dtype == torch.float32:
        h = h.to(torch.get_autocast_dtype(device_type))
    weights = (down_weight, down_bias, up_weight, up_bias)
    if not _runs_kernels(h, r):
        return adapter_torch(h, residual, *weights)
    shape = h.shape
    h = h.reshape(-1, d).contiguous()
    if residual is not None:
        residual = residual.reshape(-1, d).contiguous()
    out, _ = _forward(h, residual, *weights, keep=torch.is_grad_enabled())
    return out.view(shape)
