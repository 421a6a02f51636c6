"""Lanczos: the largest eigenvalues of a symmetric map that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 2**16
"""Columns of the basis that are rotated at once: a copy of these is all that is held beside it."""


def ritz_pairs(
    product: Callable[[Tensor], Tensor],
    basis: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Approximate eigenvalues and eigenvectors of a symmetric map A.

    Lanczos (1950) with full reorthogonalisation, twice (Parlett 1980): from a random start v_0,

        r = A v_k,   r <- r - Σ_{i <= k} v_i ⟨v_i, r⟩,   v_{k+1} = r / ‖r‖

    and A is tridiagonal in this basis. With as many vectors as A has rows the pairs are A's own. Where the basis is
    invariant already, a new random vector goes on.

    Args:
        product: ``(size,)`` to A times it.
        basis: ``(rank, size)``, memory to be filled with the Ritz vectors, one in each row; rank is at most size.
        generator: Draws the start, on the CPU.

    Returns:
        The Ritz values ``(rank,)`` float64, ascending.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 7.0]).double())
        >>> basis, generator = torch.empty(3, 3).double(), torch.Generator().manual_seed(0)
        >>> ritz_pairs(lambda vector: matrix @ vector, basis, generator).round(decimals=6)
        tensor([1., 2., 7.], dtype=torch.float64)
    """
    rank, _ = basis.shape
    diagonal = torch.zeros(rank, dtype=torch.float64)
    off_diagonal = torch.zeros(max(0, rank - 1), dtype=torch.float64)
    basis[0] = new_direction(basis[:0], basis, generator)
    for step in range(rank):
        residual = product(basis[step]).to(basis)
        diagonal[step] = residual @ basis[step]
        if step + 1 == rank:
            break
        length_before = residual.norm()
        residual = without_projections(residual, basis[: step + 1])
        length = residual.norm()
        scale = max(float(length_before), float(diagonal.abs().max()))
        rounding = 100 * torch.finfo(basis.dtype).eps * scale
        if length > rounding:
            off_diagonal[step] = length
            basis[step + 1] = residual / length
        else:
            basis[step + 1] = new_direction(basis[: step + 1], basis, generator)
    tridiagonal = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    values, rotation = torch.linalg.eigh(tridiagonal)
    rotate(basis, rotation)
    return values


def without_projections(vector: Tensor, basis: Tensor) -> Tensor:
    """Make a vector orthogonal to orthonormal rows; the second time removes what the first one's rounding left."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def new_direction(
    earlier: Tensor,
    like: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Draw a unit vector that is orthogonal to earlier ones."""
    drawn = torch.randn(like.shape[1], generator=generator, dtype=torch.float64).to(like)
    direction = without_projections(drawn, earlier)
    return direction / direction.norm()


def rotate(basis: Tensor, rotation: Tensor) -> None:
    """Replace the rows by their combinations ``rotationᵀ @ basis``, in place."""
    combine = rotation.T.to(basis)
    for start in range(0, basis.shape[1], COLUMNS_AT_ONCE):
        columns = basis[:, start : start + COLUMNS_AT_ONCE]
        columns.copy_(combine @ columns)
