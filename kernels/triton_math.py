"""Functions of a number that more than one Triton kernel takes, in few instructions and without a library."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# turns of a radian, times LN2
LN2_TURNS = tl.constexpr(0.11031780007632579)


@triton.jit
def sigmoid(x):
    # the square of a reciprocal root takes fewer instructions than a division
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))
    return root * root


@triton.jit
def silu(x):
    gate = x.to(tl.float32)
    return gate * sigmoid(gate)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), the latter by a polynomial to 2e-7 of its value."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    tail = 0.1774524 + e * (-0.107681692 + e * (0.0440896153 + e * -0.00853920449))
    tail = 0.999999821 + e * (-0.499974042 + e * (0.332754791 + e * (-0.244954616 + e * tail)))
    return tl.maximum(x, 0.0) + e * tail


@triton.jit
def rotation(turns):
    """cos and sin of so many turns, 2 pi each, to 2e-7: of what is left of half turns, by polynomials."""
    halves = tl.floor(2.0 * turns + 0.5)
    r = turns - 0.5 * halves
    s = r * r
    sine = r * (6.28318528 + s * (-41.3416807 + s * (81.6024807 + s * (-76.5812846 + s * 39.7607221))))
    cosine = 64.9393466 + s * (-85.4535682 + s * (60.1439523 + s * -24.9818362))
    cosine = 1.0 + s * (-19.7392085 + s * cosine)
    sign = 1.0 - 4.0 * tl.abs(0.5 * halves - tl.floor(0.5 * halves))
    return sign * cosine, sign * sine


@triton.jit
def expm1_over(x, exp_x):
    """(exp(x) - 1) / x, by its series where that would lose digits."""
    series = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9)))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * series)))
    return tl.where(tl.abs(x) < 0.5, series, (exp_x - 1.0) / tl.where(x == 0.0, 1.0, x))
