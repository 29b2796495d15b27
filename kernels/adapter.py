"""The adapter's bottleneck with its residual additions, in one pass: VLSM-Adapter, Eq. 1.

    a   = relu(h W1' + b1)                       [N, r]
    out = residual + h + relu(a W2' + b2)        [N, d]

for h, residual `[N, d]`, W1 `[r, d]`, W2 `[d, r]` as `nn.Linear` holds them. Eager torch writes five tensors
of N x d on the way and reads as many again; the kernel reads h and residual and writes out. Backward, with g
the gradient of out:

    dz2 = g where a W2' + b2 > 0                 dz1 = (dz2 W2) where a > 0
    dh  = g + dz1 W1                             dresidual = g
    dW1 = dz1' h,  db1 = sum dz1                 dW2 = dz2' a,  db2 = sum dz2

`a` is kept from the forward pass (r/d of h: a twelfth at r 64, d 768), a W2' + b2 is computed again. Bytes
that must move, for elements of e bytes: forward 3 N d e; backward 3 N d e (g and h in, dh out), of which g is
read a second time for the weights' gradient. Sums over rows go through partial sums in a fixed order, so that
results do not change from run to run.
"""

import torch
import torch.nn.functional as F
from torch.library import triton_op

from .dispatch import dot_precision, launcher, runs_triton, tl, triton


def reference(h, residual, down_weight, down_bias, up_weight, up_bias):
    """Compute the formula in plain torch, as eager code writes it; arguments as in `adapter_bottleneck`."""
    out = h + F.linear(F.linear(h, down_weight, down_bias).relu(), up_weight, up_bias).relu()
    return out if residual is None else residual + out


@triton.jit
def _load(base, rows, cols, stride, row_end: tl.constexpr, col_end: tl.constexpr, n_rows, n_cols):
    """Load a tile of a row-major matrix; rows and columns are checked where `row_end`, `col_end` say that the
    tile may reach over.

    `base` points to the block's first row, by a 64-bit step; within a block 32 bits do, at half the
    registers.
    """
    pointers = base + rows[:, None] * stride + cols[None, :]
    if row_end and col_end:
        return tl.load(pointers, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
    if row_end:
        return tl.load(pointers, mask=(rows < n_rows)[:, None], other=0.0)
    if col_end:
        return tl.load(pointers, mask=(cols < n_cols)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(base, values, rows, cols, stride, n_rows, n_cols):
    """Write a tile where `_load` would read it."""
    tl.store(
        base + rows[:, None] * stride + cols[None, :],
        values,
        mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :],
    )


@triton.jit
def _vector(base, at, size):
    """Load some entries of a bias, in float32."""
    return tl.load(base + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    h, residual, w1, b1, w2, b2, out, hidden, N,
    D: tl.constexpr, R: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one block of rows a program; h comes from the L2 cache when it is read again."""
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
    """Sum the gradients of some columns over `rows_each` rows: a row `[dW1 | db1 | dW2 | db2]` of `partial` a
    program.
    """
    part = tl.program_id(1).to(tl.int64)
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
        first = part * rows_each + start
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
    base = partial + part * (2 * D * R + D + R)
    _store(base, tl.trans(dw1), units, cols, D, R, D)
    if tl.program_id(0) == 0:
        tl.store(base + D * R + units, db1, mask=units < R)
    _store(base + D * R + R, dw2, cols, units, R, D, R)
    tl.store(base + 2 * D * R + R + cols, db2, mask=cols < D)


# Launch sizes by (bytes an element, r rounded up): rows, columns, warps and stages of the three kernels. A
# table, not auto-tuning, whose first calls take seconds. No entry spills a register, and but for the last,
# none needs more than 99 KiB of shared memory (see tests/test_ahead_of_time.py).
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


def blocks(kernel, r, element_size):
    """Return the launch sizes of one of `KERNELS` for a bottleneck of `r` units, as keywords."""
    block_r = max(16, triton.next_power_of_2(r))
    n, d, warps, stages = BLOCKS[element_size, block_r][KERNELS.index(kernel)]
    return dict(BLOCK_N=n, BLOCK_D=d, BLOCK_R=block_r, num_warps=warps, num_stages=stages)


@torch.compiler.assume_constant_result
def _shared_memory(device):
    """Return the bytes of shared memory that a program may ask for on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _takes(h, r):
    """Tell whether the kernels take rows `h` and a bottleneck of `r` units; otherwise the reference does."""
    if not runs_triton(h):
        return False
    needs = (h.element_size(), max(16, triton.next_power_of_2(r)))
    if needs in SHARED_MEMORY and h.is_cuda:
        return _shared_memory(h.device) >= SHARED_MEMORY[needs]
    return needs in BLOCKS


def _launch(kernel, grid, *tensors, **sizes):
    launcher(kernel)[grid](*tensors, **sizes, PRECISION=dot_precision())


@triton_op("vlsm::adapter_bottleneck", mutates_args=())
def _forward(
    h: torch.Tensor,
    residual: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out `[N, d]`, a `[N, r]`) of contiguous `h`, `residual` `[N, d]`; a is empty unless `keep`."""
    (n, d), r = h.shape, len(down_weight)
    dtype = h.dtype if residual is None else torch.promote_types(h.dtype, residual.dtype)
    out, a = torch.empty_like(h, dtype=dtype), h.new_empty((n, r) if keep else 0)
    sizes = blocks("forward", r, h.element_size())
    _launch(
        forward_kernel, (triton.cdiv(n, sizes["BLOCK_N"]),),
        h, h if residual is None else residual,
        down_weight.to(h.dtype), down_bias, up_weight.to(h.dtype), up_bias, out, a, n,
        D=d, R=r, HAS_RESIDUAL=residual is not None, KEEP=keep, **sizes,
    )  # fmt: skip
    return out, a


@triton_op("vlsm::adapter_bottleneck_backward", mutates_args=())
def _backward(
    g: torch.Tensor,
    h: torch.Tensor,
    a: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    with_h: bool,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dh `[N, d]`, `[dW1 | db1 | dW2 | db2]` flat and float32); what is not wanted is empty."""
    w1, w2 = down_weight.to(h.dtype), up_weight.to(h.dtype)
    (n, d), r = h.shape, len(w1)
    dh, dz1 = h.new_empty(h.shape if with_h else 0), h.new_empty(a.shape if with_weights else 0)
    sizes = blocks("rows", r, h.element_size())
    _launch(
        backward_rows_kernel, (triton.cdiv(n, sizes["BLOCK_N"]),),
        g, a, w1, w2, up_bias, dh, dz1, n,
        D=d, R=r, WITH_H=with_h, WITH_WEIGHTS=with_weights, **sizes,
    )  # fmt: skip
    if not with_weights:
        return dh, down_weight.new_empty(0)
    sizes = blocks("weights", r, h.element_size())
    columns = triton.cdiv(d, sizes["BLOCK_D"])
    parts = max(1, min(triton.cdiv(n, 4 * sizes["BLOCK_N"]), PROGRAMS // columns))
    rows_each = triton.cdiv(triton.cdiv(n, parts), sizes["BLOCK_N"]) * sizes["BLOCK_N"]
    partial = torch.empty(parts, 2 * d * r + d + r, dtype=torch.float32, device=h.device)
    _launch(
        backward_weights_kernel, (columns, parts),
        g, h, a, dz1, w2, up_bias, partial, n, rows_each, D=d, R=r, **sizes,
    )  # fmt: skip
    return dh, partial.sum(0)


def _save_for_backward(ctx, inputs, output):
    h, _, down_weight, _, up_weight, up_bias, _ = inputs
    ctx.save_for_backward(h, output[1], down_weight, up_weight, up_bias)
    ctx.set_materialize_grads(False)


def _gradients(ctx, g, _):
    if g is None:  # nothing depends on the result
        return (None,) * 7
    h, a, down_weight, up_weight, up_bias = ctx.saved_tensors
    with_h, with_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:6])
    dh, weights = None, [None] * 4
    if with_h or with_weights:
        dh, flat = _backward(g.contiguous(), h, a, down_weight, up_weight, up_bias, with_h, with_weights)
    if with_weights:
        (r, d), n = down_weight.shape, down_weight.numel()
        dw1, db1, dw2, db2 = flat.split([n, r, n, d])
        weights = [dw1.view(r, d), db1, dw2.view(d, r), db2]
    return dh if with_h else None, g if ctx.needs_input_grad[1] else None, *weights, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def adapter_bottleneck(h, residual, down_weight, down_bias, up_weight, up_bias):
    """Compute `residual + h + relu(relu(h W1' + b1) W2' + b2)`, without the first term where `residual` is
    None.

    h, residual: `[..., d]`; weights as `nn.Linear` holds them, `[r, d]`, `[r]`, `[d, r]`, `[d]`. Under
    autocast h takes the autocast dtype, as at an `nn.Linear`; products are of h's dtype, sums and the
    weights' gradients of float32. The result has the wider dtype of h and residual. Raises ValueError where
    shapes do not fit.
    """
    r, d = down_weight.shape
    if h.shape[-1] != d or up_weight.shape != (d, r) or (residual is not None and residual.shape != h.shape):
        other = "no residual" if residual is None else f"residual {list(residual.shape)}"
        weights = f"weights {list(down_weight.shape)}, {list(up_weight.shape)}"
        raise ValueError(f"h {list(h.shape)}, {other} and {weights} do not fit together.")
    if torch.is_autocast_enabled(h.device.type) and h.dtype == torch.float32:
        h = h.to(torch.get_autocast_dtype(h.device.type))
    if not _takes(h, r):
        return reference(h, residual, down_weight, down_bias, up_weight, up_bias)
    shape = h.shape
    h = h.reshape(-1, d).contiguous()
    residual = None if residual is None else residual.reshape(-1, d).contiguous()
    tensors = (h, residual, down_weight, down_bias, up_weight, up_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward(*tensors, keep)[0].view(shape)
