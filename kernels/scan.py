"""The selective scan, the operation every Mamba layer is built on, with one signature for every back end.

    h_t = exp(delta_t A) h_{t-1} + gain_t B_t u_t,   y_t = C_t . h_t + D u_t        (Mamba, equations 2 and 4)

The public function checks its arguments and calls an operator (operators.py), so that torch.compile, torch.export,
activation checkpointing and autocast see one node with a known gradient.
"""

from typing import Any

import torch
from torch import Tensor

from . import backend as backends
from . import reference, scan_torch
from .checks import NUMBERS, check_discretization, check_states, check_tensor, count_sequences, expect
from .operators import Operator

# what the Triton kernels take beside real numbers
TRITON_ALSO = {"euler": (torch.complex64,), "zoh": ()}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    B_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "euler",
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scan u (b, l, d) with steps delta; return y (b, l, d) and, when asked for, the last state (b, d, n),
    else None.

    Args:
        u: the input (b, l, d), float32, bfloat16, float16 or float64.
        delta: the step size (b, l, d), or (d,) where it does not depend on the input.
        A: the diagonal of the state matrix (d, n), float32 or complex64; float64 or complex128 beside float64 u.
        B, C: selective (b, l, n), selective by groups of channels (b, l, g, n), or constant (d, n); complex
            beside a complex A, when the state is complex too and y = 2 Re(C . h) + D u.
        D: the skip (d,).
        z: the gate (b, l, d); y is multiplied by silu(z).
        delta_bias: added to delta (d,).
        delta_softplus: delta becomes softplus(delta), after its bias.
        B_bias: added to a selective B in every channel (d, n), of A's dtype.
        initial_state: the state before the first step (b, d, n), differentiable, as the last one is.
        cu_seqlens: int32 (s + 1,), beside b = 1: sequence i fills [cu_seqlens[i], cu_seqlens[i + 1]) and has a
            state of its own, so that states are (s, d, n) and nothing flows from one sequence to the next.
        reverse: scan from the last step to the first: the initial state enters at the last step of each
            sequence, and the state returned is the one at its first.
        discretization: how B u is held over a step: "euler", gain = delta, as every released Mamba does;
            "zoh", the exact hold, gain = expm1(delta A) / A.
        deterministic: bitwise the same from run to run, gradients included; every back end there is does so.
        backend: "triton", "torch" or "reference"; None leaves it to the device and to MAMBAZOO_BACKEND. Where
            Triton has no kernel, for float64 and for the exact hold of a complex A, "triton" gives way to "torch".

    Raises:
        ValueError: when shapes, dtypes, devices or cu_seqlens do not fit; the message names the argument.

    Source: Gu and Dao, Mamba (2312.00752), section 3 and algorithm 2; complex A as in S4D (Gu et al., 2206.11893);
    B_bias as in B2S6 (Yu and Erichson, 2505.09022, algorithm 2).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens, discretization)
    # of nothing the reference alone makes nothing without further care
    requested = "reference" if u.numel() == 0 else backend
    name = backends.choose(
        requested,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        B_bias,
        initial_state,
        also=TRITON_ALSO[discretization],
    )
    if name == "reference":
        y, final_state = reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus,
            B_bias=B_bias, initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse,
            discretization=discretization,
        )  # fmt: skip
    else:
        y, final_state, _ = _scan(
            u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens,
            delta_softplus, return_final_state, reverse, discretization, name,
        )  # fmt: skip
    return y, final_state if return_final_state else None


def _implementation(backend: str) -> Any:
    if backend == "torch":
        return scan_torch
    from . import scan_triton

    return scan_triton


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    B_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    return_final_state: bool,
    reverse: bool,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False), backends.launching_on(u):
        y, final_state, starts = _implementation(backend).scan_fwd(
            u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens,
            delta_softplus, reverse, discretization, return_final_state=return_final_state,
        )  # fmt: skip
    return y, final_state.contiguous() if return_final_state else starts.new_empty(0), starts


def _gradients(
    dy: Tensor | None,
    d_final: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    B_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    discretization: str,
    backend: str,
) -> list[Tensor]:
    """The gradient of each tensor from u to initial_state; an empty tensor where there was none."""
    with torch.autocast(u.device.type, enabled=False), backends.launching_on(u):
        gradients = _implementation(backend).scan_bwd(
            dy, d_final, starts,
            u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens, delta_softplus, reverse,
            discretization,
        )  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state)
    return [
        u.new_empty(0) if x is None or gradient is None else gradient.to(x.dtype).contiguous()
        for x, gradient in zip(inputs, gradients, strict=True)
    ]


def _fake(u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens, *flags):  # type: ignore[no-untyped-def]
    _, return_final_state, _, _, backend = flags
    states = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(A.dtype, torch.promote_types(u.dtype, torch.float32))
    final_state = u.new_empty((states, *A.shape) if return_final_state else 0, dtype=dtype)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    starts = _implementation(backend).empty_starts(u, A, sequences)
    return torch.empty_like(u, memory_format=torch.contiguous_format), final_state, starts


def _gradients_fake(dy, d_final, starts, *rest):  # type: ignore[no-untyped-def]
    u, *_ = inputs = rest[:10]
    return [
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs
    ]


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, delta_softplus, ctx.returned_final_state, reverse, discretization, backend = inputs
    ctx.flags = (delta_softplus, reverse, discretization, backend)
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_final, _):  # type: ignore[no-untyped-def]
    starts, *tensors = ctx.saved_tensors
    d_final = d_final if ctx.returned_final_state else None
    gradients = _scan_backward(dy, d_final, starts, *tensors, *ctx.flags)
    wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:10], strict=True))
    return *wanted, None, None, None, None, None, None


_scan = Operator("selective_scan", _forward, _fake, (_save_for_backward, _backward))
_scan_backward = Operator("selective_scan_backward", _gradients, _gradients_fake)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    B_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
) -> None:
    check_tensor("u", u)
    check_tensor("A", A, NUMBERS)
    if u.ndim != 3:
        raise ValueError(f"u must be (b, l, d), not {tuple(u.shape)}")
    (b, l, d), n = u.shape, A.shape[-1] if A.ndim else 0
    real = torch.promote_types(u.dtype, torch.float32)
    complex_ = torch.promote_types(real, torch.complex32)
    if A.ndim != 2 or A.shape[0] != d or A.dtype not in (real, complex_):
        raise ValueError(
            f"A must be (d, n) = ({d}, n) in {real} or {complex_}, not {tuple(A.shape)} {A.dtype}: "
            "keep A in full precision under mixed precision"
        )
    check_states(n)
    states = count_sequences(cu_seqlens, u)
    expect("delta", delta, u.device, (b, l, d), (d,))
    for name, matrix in (("B", B), ("C", C)):
        expect(name, matrix, u.device, (b, l, n), (b, l, None, n), (d, n), dtypes=NUMBERS)
        if matrix.ndim == 4 and d % matrix.shape[2]:
            raise ValueError(f"{name} has {matrix.shape[2]} groups, which do not divide d = {d} channels")
        if matrix.is_complex() != A.is_complex():
            raise ValueError(
                f"{name} must be {'complex' if A.is_complex() else 'real'}, as A is, not {matrix.dtype}"
            )
    if B.ndim == C.ndim == 4 and B.shape[2] != C.shape[2] and 1 not in (B.shape[2], C.shape[2]):
        raise ValueError(
            f"B has {B.shape[2]} groups and C has {C.shape[2]}: give them the same number, or one of them 1"
        )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        expect(name, vector, u.device, (d,))
    expect("A", A, u.device, (d, n), dtypes=NUMBERS)
    expect("B_bias", B_bias, u.device, (d, n), dtypes=NUMBERS)
    if B_bias is not None and B_bias.dtype != A.dtype:
        raise ValueError(f"B_bias must be {A.dtype}, as A is, not {B_bias.dtype}")
    if B_bias is not None and B.ndim == 2:
        raise ValueError("B_bias must come beside a selective B; add it to a constant one")
    expect("z", z, u.device, (b, l, d))
    expect("initial_state", initial_state, u.device, (states, d, n), dtypes=NUMBERS)
    if initial_state is not None and initial_state.dtype != A.dtype:
        raise ValueError(f"initial_state must be {A.dtype}, as A is, not {initial_state.dtype}")
    check_discretization(discretization)
