"""Orthogonal matrices to rotate with: Hadamard's, which spread outliers evenly, or random ones."""

from contextlib import suppress

import torch


def orthogonal(
    width: int, fixes_ones: bool, generator: torch.Generator, random: bool = False
) -> torch.Tensor:
    """An orthogonal matrix [width, width], float64, drawn from ``generator``.

    Args:
        fixes_ones: it leaves the vector of ones alone, as U diag(1, ...) Uᵀ does whose U begins
            with that vector.
        random: the Q of a Gaussian's QR; else a Hadamard matrix with random signs, where one of
            this size is known.
    """
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    basis = None
    if not random:
        with suppress(ValueError):  # no Hadamard matrix of this size is known
            basis = random_hadamard_matrix(width, torch.float64, gen=generator) / width**0.5
    if basis is None:
        gaussian = torch.randn(width, width, dtype=torch.float64, generator=generator)
        if fixes_ones:
            gaussian[:, 0] = 1
        basis = torch.linalg.qr(gaussian)[0]
    if not fixes_ones:
        return basis
    basis = basis * basis[:, :1].sign()
    signs = torch.randint(2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    signs[0] = 1
    return (basis * signs) @ basis.T
