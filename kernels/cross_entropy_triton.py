"""Cross-entropy and its gradient over rows of logits in Triton: one read, or a read, a second from cache and a write.

A program takes a row. Each lane keeps a running maximum m and the sum s of exp(x - m) over the columns that it sees,
at one exponential a column; the lanes' pairs are put together at the end. The gradient overwrites the logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor

from .triton_math import LN2, LOG2E

# below every logarithm of base 2 of a float, and no infinity, which would make NaN of a difference
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _columns(row_ptr, cols, end, width):
    # the mask is by the width of a row in memory, a multiple of 16, so that vectors are loaded whole
    x = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return tl.where(cols < end, x, float("-inf"))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    width,
    vocab_size,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    target = tl.load(targets_ptr + row)
    used = target != ignore_index
    inside = (target >= 0) & (target < vocab_size)
    # a target that is no column is NaN in the loss and in the gradient, and reads nothing
    picked = tl.load(row_ptr + target, mask=used & inside, other=float("nan")).to(tl.float32)
    cols = tl.arange(0, BLOCK)
    # an ignored row is not read, and all zeros
    end = tl.where(used, vocab_size, 0)

    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, end, BLOCK):
        x = _columns(row_ptr, start + cols, end, width) * LOG2E
        e = tl.exp2(-tl.abs(x - m))
        s = tl.where(x > m, s * e + 1.0, s + e)
        m = tl.maximum(m, x)
    top = tl.max(m, 0)
    lse = top + tl.log2(tl.sum(s * tl.exp2(m - top), 0))
    tl.store(losses_ptr + row, tl.where(used, lse * LN2 - picked, 0.0))

    if GRADIENT:
        lse = tl.where(used, lse, 0.0)
        scale = tl.where(used & (inside == 0), float("nan"), 1.0)
        if HAS_WEIGHTS:
            scale *= tl.load(weights_ptr + row).to(tl.float32)
        for start in range(0, width, BLOCK):
            here = start + cols
            p = tl.exp2(_columns(row_ptr, here, end, width) * LOG2E - lse)
            p = tl.where(here == target, p - 1.0, p) * scale
            tl.store(row_ptr + here, p.to(logits_ptr.dtype.element_ty), mask=here < width)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    losses: Tensor,
    vocab_size: int,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Write the losses (t,) of logits (t, v) and, if asked for, the gradient over the logits.

    The logits' rows are a multiple of 16 elements apart, and what is between them is this function's to overwrite.
    """
    width = logits.stride(0)
    # 16 columns a lane at most: two programs fit a multiprocessor, and the rows under work fit the cache
    block = min(triton.next_power_of_2(width), 8192)
    _cross_entropy_kernel[(len(logits),)](
        logits,
        targets,
        token_weights,
        losses,
        width,
        vocab_size,
        ignore_index,
        HAS_WEIGHTS=token_weights is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
