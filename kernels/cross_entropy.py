"""The loss of a linear read-out over a vocabulary, without its logits ever being in memory all at once.

    logits = y W^T,   loss_t = log sum_v exp(logits_tv) - logits_t,target
    d loss_t / d logits_tv = softmax(logits_t)_v - [v = target]

What is differentiated is the (weighted) sum of all losses, so that the gradients of y and W are known up to one number
when the loss is: the forward takes them chunk by chunk, from the same logits, and the backward only scales them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference
from .checks import INTEGERS, REAL, check_tensor, expect

# what one chunk of logits may take, in bytes: on a GPU enough for large products, on a CPU little, for its caches
CHUNK, CPU_CHUNK = 2**30, 2**24


def linear_cross_entropy(
    y: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read y (..., d) out by weight (v, d); return the sum of the losses of targets (...), and each of them (...).

    Losses are in nats and float32 (float64 for float64 y); those of targets that are ignore_index are 0. Only the sum,
    in which token_weights (...) says what each counts, has a gradient, by y and weight. Rows of weight from vocab_size
    on are padding and take no part; a target outside the vocabulary is an error or, on a GPU, a loss that is not
    a number. The product is in y's dtype, or autocast's.

    Raises:
        ValueError: when shapes do not fit; the message names the argument.
    """
    check_tensor("y", y)
    if y.ndim == 0:
        raise ValueError("y must be (..., d), not ()")
    expect("weight", weight, y.device, (None, y.shape[-1]))
    expect("targets", targets, y.device, tuple(y.shape[:-1]), dtypes=INTEGERS)
    counts = (*REAL, *INTEGERS, torch.bool)
    expect("token_weights", token_weights, y.device, tuple(y.shape[:-1]), dtypes=counts)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size must be from 1 to {weight.shape[0]}, the rows of weight, not {vocab_size}"
        )
    device = y.device.type
    # an operator of one's own is not autocast
    if torch.is_autocast_enabled(device) and y.dtype != torch.float64:
        y = y.to(torch.get_autocast_dtype(device))
    name = backends.choose(backend, y, weight)
    if name == "reference":
        total, losses = reference.linear_cross_entropy(
            y, weight, targets, token_weights=token_weights, vocab_size=vocab_size, ignore_index=ignore_index
        )
        return total, losses.detach()
    grad = torch.is_grad_enabled()
    total, losses, _, _ = _loss(
        y.reshape(targets.numel(), y.shape[-1]),
        weight,
        targets.flatten().long(),
        None
        if token_weights is None
        else token_weights.flatten().to(torch.promote_types(y.dtype, torch.float32)),
        vocab_size,
        ignore_index,
        grad and y.requires_grad,
        grad and weight.requires_grad,
        name,
    )
    return total, losses.view(targets.shape)


@torch.library.custom_op("mambazoo::linear_cross_entropy", mutates_args=())
def _loss(
    y: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    y_gradient: bool,
    weight_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the losses, and the gradients of the sum by y and weight (empty where not asked for)."""
    if backend == "triton":
        from .cross_entropy_triton import cross_entropy
    else:
        cross_entropy = _cross_entropy
    (t, d), v, wide = y.shape, weight.shape[0], torch.promote_types(y.dtype, torch.float32)
    losses = y.new_empty(t, dtype=wide)
    dy = y.new_empty((t, d) if y_gradient else 0)
    dw = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide)) if weight_gradient else None
    with torch.autocast(y.device.type, enabled=False):
        w = weight.to(y.dtype)
        # rows start at multiples of 16 elements, for vector loads
        width = -(-v // 16) * 16
        rows = chunk_rows(t, width * y.element_size(), CPU_CHUNK if y.device.type == "cpu" else CHUNK)
        buffer = y.new_empty(rows, width)
        for start in range(0, t, rows):
            part = slice(start, start + rows)
            logits = torch.mm(y[part], w.t(), out=buffer[: min(rows, t - start), :v])
            counts = None if token_weights is None else token_weights[part]
            gradient = y_gradient or weight_gradient
            with backends.launching_on(y):
                cross_entropy(logits, targets[part], counts, losses[part], vocab_size, ignore_index, gradient)
            if y_gradient:
                torch.mm(logits, w, out=dy[part])
            if dw is not None:
                _add_product(dw, logits, y[part])
    total = losses.sum() if token_weights is None else (losses * token_weights).sum()
    return total, losses, dy, weight.new_empty(0) if dw is None else dw.to(weight.dtype)


@torch.library.custom_op("mambazoo::linear_cross_entropy_backward", mutates_args=())
def _scaled(gradient: Tensor, d_total: Tensor) -> Tensor:
    """An operator without a gradient of its own: where one is asked for, it says so."""
    return gradient * d_total


@_scaled.register_fake
def _scaled_fake(gradient, d_total):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient)


def chunk_rows(tokens: int, row: int, limit: int) -> int:
    """How many tokens have their logits, `row` bytes each, in memory at a time: chunks as even as can be."""
    most = max(128, limit // row // 128 * 128)
    chunks = max(1, -(-tokens // most))
    return min(most, max(128, -(-tokens // chunks // 128) * 128))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to total in its dtype, also where that is wider than theirs."""
    if left.dtype != total.dtype and left.is_cuda and torch.version.hip is None:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    losses: Tensor,
    vocab_size: int,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Write the losses (t,) of logits (t, v) and, if asked for, the gradient over the logits."""
    log_p = F.log_softmax(logits[:, :vocab_size], -1, dtype=losses.dtype)
    losses.copy_(F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none"))
    if not gradient:
        return
    used = (targets != ignore_index).to(losses.dtype)
    d_logits = log_p.exp_()
    # an ignored target points at any column: its row becomes 0
    d_logits[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    d_logits *= (used if token_weights is None else used * token_weights).unsqueeze(1)
    logits[:, :vocab_size] = d_logits
    logits[:, vocab_size:] = 0


@_loss.register_fake
def _loss_fake(  # type: ignore[no-untyped-def]
    y, weight, targets, token_weights, vocab_size, ignore_index, y_gradient, weight_gradient, backend
):
    wide = torch.promote_types(y.dtype, torch.float32)
    dy = y.new_empty(y.shape if y_gradient else 0)
    dw = weight.new_empty(weight.shape if weight_gradient else 0)
    return y.new_empty((), dtype=wide), y.new_empty(targets.shape, dtype=wide), dy, dw


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, losses, dy, dw = output
    ctx.gradients = inputs[6:8]
    ctx.save_for_backward(dy, dw)
    ctx.mark_non_differentiable(losses, dy, dw)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_total, *rest):  # type: ignore[no-untyped-def]
    found = (
        _scaled(gradient, d_total) if wanted and d_total is not None else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.gradients, strict=True)
    )
    return *found, *(None,) * 7


_loss.register_autograd(_backward, setup_context=_save_for_backward)
