"""Second moments of a stage's input, and the inverse factor that GPTQ-like solvers walk along.

Legend: N tokens, I in features.

Cost, in multiply-adds: N * I^2 / 2 for the moments (the floor, since the matrix is symmetric; the
column blocks used here do 1/2 + 1/(2 * COLUMN_BLOCKS) of the full product), I^3 / 6 for the
Cholesky factor and I^3 / 6 for its triangular inverse.
"""

import logging

import torch

from harness import distributed

log = logging.getLogger(__name__)

COLUMN_BLOCKS = 8
MAX_DAMPING = 1.0


class Hessian:
    """Running sum of x xᵀ over tokens; the layer-wise Hessian up to a constant (GPTQ, eq. 1).

    Products are float32, sums over batches float64: the result does not depend on how batches are
    dealt out to ranks (to 1e-16, so after rounding to float32 not at all, almost always).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., I] of any float dtype. Only the lower triangle is kept."""
        x = inputs.flatten(0, -2)
        self.tokens += len(x)
        columns = x.shape[1]
        width = -(-columns // (COLUMN_BLOCKS if columns >= 512 else 1))
        if x.device.type != "cuda" or x.dtype == torch.float64:
            x = x.float()
        for start in range(0, columns, width):
            block = _product(x[:, start:], x[:, start : start + width])
            self.total[start:, start : start + width] += block

    def reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        self.tokens = distributed.sum_number(self.tokens)
        distributed.sum_in_place(self.total)

    def mean(self) -> torch.Tensor:
        """The symmetric matrix sum(x xᵀ) / N, float32 [I, I]; frees the running sum."""
        matrix = (self.total / max(self.tokens, 1)).float()
        self.total = None
        lower = matrix.tril_()
        return lower + lower.tril(-1).T


class GroupMoments:
    """Second moments of every group's inputs: the blocks on the diagonal of the layer's Hessian."""

    def __init__(self, columns: int, device: torch.device | str = "cpu", group_size: int = -1):
        self.width = columns if group_size == -1 else group_size
        self.groups = [Hessian(self.width, device) for _ in range(columns // self.width)]

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., I] of any float dtype."""
        for group, part in zip(self.groups, inputs.split(self.width, dim=-1), strict=True):
            group.add(part)

    def reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        for group in self.groups:
            group.reduce()

    def mean(self) -> torch.Tensor:
        """[G, g, g] float32; frees the running sums."""
        return torch.stack([group.mean() for group in self.groups])


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ @ right in float32. On CUDA 16-bit inputs go through the tensor cores: products of two
    16-bit floats are exact in float32, so nothing is lost against converting first."""
    if left.dtype == torch.float32:
        return left.T @ right
    return torch.mm(left.T, right, out_dtype=torch.float32)


def inverse_factor(
    hessian: torch.Tensor, percdamp: float = 0.01, name: str = ""
) -> tuple[torch.Tensor, float]:
    """Upper triangular R with RᵀR = (H + damping)⁻¹, and the damping used.

    With J the flip of both axes and L Lᵀ = J H J, R = J L⁻¹ J: one Cholesky and one triangular
    inverse, in place of Cholesky, inverse, Cholesky.

    Args:
        hessian: [I, I] float32 or float64, symmetric; not modified.
        percdamp: damping as a fraction of the mean of the diagonal (GPTQ section 3.3, step 3).
        name: for the warning when the damping has to be raised.

    Raises:
        ArithmeticError: not positive definite even with the largest damping.
    """
    diagonal = hessian.diagonal()
    flipped = hessian.flip(0, 1)
    while True:
        damped = flipped.clone()
        damped.diagonal().add_(percdamp * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return invert_lower(lower).flip(0, 1), percdamp
        raised = max(percdamp, 1e-4) * 10
        if raised > MAX_DAMPING:
            raise ArithmeticError(
                f"the Hessian of {name or 'a stage'} is not positive definite even with damping "
                f"{percdamp} of its mean diagonal."
            )
        log.warning("%s: Hessian not positive definite; damping %g -> %g", name, percdamp, raised)
        percdamp = raised


def invert_lower(lower: torch.Tensor, leaf: int = 256) -> torch.Tensor:
    """Inverse of a lower triangular matrix [I, I], by halves: I^3 / 6 multiply-adds in products,
    where a triangular solve against the identity would take I^3 / 2."""
    n = len(lower)
    inverse = torch.zeros_like(lower)
    if n <= leaf:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = n // 2
    top = inverse[:half, :half] = invert_lower(lower[:half, :half], leaf)
    bottom = inverse[half:, half:] = invert_lower(lower[half:, half:], leaf)
    inverse[half:, :half] = -(bottom @ (lower[half:, :half] @ top))
    return inverse
