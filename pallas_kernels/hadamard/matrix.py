"""Symmetric Hadamard matrices, built from quadratic residues.

Orders: powers of two (Sylvester 1867), and powers of two times what Paley 1933 gives: q + 1 for a prime q = 3 mod 4
(construction I, its core's columns reversed so that it is symmetric), 2 (q + 1) for a prime q = 1 mod 4 (construction
II). A symmetric orthonormal matrix is its own inverse, so a rotation undoes itself.
"""

import math
from functools import lru_cache

import numpy as np

LARGEST_DENSE = 512  # order of a matrix that is multiplied as it stands; larger ones are products of smaller ones
_FACTOR = 128  # order from which a factor fills a matrix unit
_LARGEST_PALEY = 1024  # a larger base would make a rotation as dear as a linear layer


def has_hadamard(dim: int) -> bool:
    """Whether there is a matrix for `dim` here."""
    return dim > 0 and dim % _base(dim) == 0


def check_hadamard(dim: int) -> None:
    """Raise ValueError if there is no matrix for `dim` here."""
    if not has_hadamard(dim):
        base = _base(dim)
        more = f", or {base} times one" if 1 < base <= _LARGEST_PALEY else ""
        raise ValueError(f"dim={dim} has no Hadamard matrix here: it must be a power of 2{more}.")


def largest_order(dim: int) -> int:
    """The largest divisor of `dim` that has a matrix here; at least 1."""
    return max(order for order in range(1, dim + 1) if dim % order == 0 and has_hadamard(order))


def factors(dim: int) -> tuple[int, ...]:
    """Orders whose matrices' Kronecker product, in this order, is the matrix of `dim`; none is above 1024.

    Raises:
      ValueError: If there is none here for `dim`.
    """
    check_hadamard(dim)
    last = _base(dim)
    while last < _FACTOR and dim % (2 * last) == 0:
        last *= 2
    rest = dim // last
    return (*(factors(rest) if rest > 1 else ()), last)


@lru_cache
def hadamard_matrix(dim: int) -> np.ndarray:
    """Return the symmetric matrix i8[D, D] of +1 and -1 whose rows are orthogonal.

    Raises:
      ValueError: If there is none here for `dim`.
    """
    check_hadamard(dim)
    matrix = np.ones((1, 1), np.int8)
    base = _base(dim)
    if base > 1:
        matrix = _paley_1(base - 1) if _is_prime(base - 1) else _paley_2(base // 2 - 1)
    while len(matrix) < dim:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
    matrix.setflags(write=False)  # shared by all callers
    return matrix


def rotate_blocks_host(x: np.ndarray) -> np.ndarray:
    """Rotate the last axis of x as `api.hadamard_blocks` does, on the host and in x's own precision."""
    shape, size = x.shape, largest_order(x.shape[-1])
    orders = factors(size)
    for i, order in enumerate(orders):
        x = hadamard_matrix(order).astype(x.dtype) @ x.reshape(-1, order, math.prod(orders[i + 1 :]))
    return x.reshape(shape) * np.asarray(size, x.dtype) ** -0.5


@lru_cache
def _base(dim: int) -> int:
    """The smallest order whose products with powers of two may be `dim`; above `dim` if there is none."""
    odd = dim // (dim & -dim) if dim > 0 else 3
    if odd == 1:
        return 1
    base = 4 * odd
    while base <= _LARGEST_PALEY and not _is_prime(base - 1) and not (base % 8 == 4 and _is_prime(base // 2 - 1)):
        base *= 2
    return base if base <= _LARGEST_PALEY else max(base, dim + 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def _paley_1(field: int) -> np.ndarray:
    """Order field + 1, for a prime 3 mod 4."""
    i = np.arange(field)
    total = (i[:, None] + i[None]) % field
    core = -_residue(total, field) - (total == 0)
    return _bordered(core, 1)


def _paley_2(field: int) -> np.ndarray:
    """Order 2 (field + 1), for a prime 1 mod 4."""
    i = np.arange(field)
    conference = _bordered(_residue((i[:, None] - i[None]) % field, field), 0)
    diagonal = np.eye(field + 1, dtype=np.int8)
    return np.kron(conference, [[1, 1], [1, -1]]).astype(np.int8) + np.kron(diagonal, [[1, -1], [-1, -1]])


def _residue(x: np.ndarray, field: int) -> np.ndarray:
    """+1 for squares of the field, -1 for the others, 0 for 0."""
    symbol = np.full(field, -1)
    symbol[np.arange(field) ** 2 % field] = 1
    symbol[0] = 0
    return symbol[x]


def _bordered(core: np.ndarray, corner: int) -> np.ndarray:
    """Put a row and a column of ones before a matrix."""
    matrix = np.ones((len(core) + 1,) * 2, np.int8)
    matrix[1:, 1:] = core
    matrix[0, 0] = corner
    return matrix
