"""Integers that grids and tiles are made of.

Triton has functions of these names that also work within kernels; called by a launcher they cost the host 1.4 us each
(2 cores of an EPYC), a tenth of what it costs to launch a kernel.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()
