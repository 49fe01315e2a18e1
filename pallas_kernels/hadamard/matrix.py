"""Symmetric Hadamard matrices, built from quadratic residues.

Orders: powers of two (Sylvester 1867), and 12, 20 or 28 times one (Paley 1933: construction I over 11 and 19 elements,
its core's columns reversed so that it is symmetric; construction II over 13). A symmetric orthonormal matrix is its own
inverse, so a rotation undoes itself.
"""

from functools import lru_cache

import numpy as np

_PALEY = {3: (1, 11), 5: (1, 19), 7: (2, 13)}  # odd part of the order -> construction and field


@lru_cache
def hadamard_matrix(dim: int) -> np.ndarray:
    """Return the symmetric matrix i8[D, D] of +1 and -1 whose rows are orthogonal.

    Raises:
      ValueError: If there is none here for `dim`.
    """
    odd = dim // (dim & -dim) if dim > 0 else 0
    if odd != 1 and (odd not in _PALEY or dim % (4 * odd)):
        raise ValueError(f"dim={dim} must be a power of 2, or 12, 20 or 28 times one.")
    matrix = np.ones((1, 1), np.int8)
    if odd != 1:
        construction, field = _PALEY[odd]
        matrix = _paley_1(field) if construction == 1 else _paley_2(field)
    while len(matrix) < dim:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
    matrix.setflags(write=False)  # shared by all callers
    return matrix


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
