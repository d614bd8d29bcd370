"""Whole numbers as the host counts with them: Triton's functions of these names take it many times as long."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two from n, 1 or more, on."""
    return 1 << (n - 1).bit_length()
