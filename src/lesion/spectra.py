"""Spectra of matrices and the numbers that sum them up, in float64. Effective rank: Roy & Vetterli 2007, "The effective rank:
a measure of effective dimensionality"; participation ratio: Gao et al. 2017, "A theory of multineuronal dimensionality,
dynamics and measurement"; stable rank: Rudelson & Vershynin 2007, "Sampling from large matrices"; moments that are updated
chunk by chunk: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".

Of singular values s₁ ≥ s₂ ≥ … ≥ 0, with p = s / Σs and λ = s²:

    effective_rank        exp(−Σ p ln p)         1 for one direction, k for k equal ones, at most the rank
    participation_ratio   (Σλ)² / Σλ²            the same bounds; large directions count for more
    stable_rank           Σλ / λ₁                the same bounds; only the largest direction counts
    gap                   (s₁ − s₂) / s₁         0 for equal ones, 1 for one direction; None of a single singular value
    top_share             λ₁ / Σλ                1 / stable_rank
    described             exp(−Σ p ln p) over p > 0.01, not normed again: 1 where no direction holds more than 0.01

All are without unit and do not change with the scale of the matrix. Of a matrix of zeros all are None: 0 / 0.

Singular values come as roots of the eigenvalues of the smaller Gram matrix, of which the lower triangle is made. Eigenvalues
up to √d·ε·λ₁ are rounding and count as 0: a direction with less than d^¼·√ε of s₁ (7e-8 for d = 576) is not seen. Float32
products would not do: what they leave of a collapsed matrix, 1e-4 of s₁ in hundreds of directions, passes for rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROWS = 1024  # rows that are turned to float64 together
COLUMNS = 144  # width of a block of the lower triangle
KEPT = 0.01  # the described definition drops what has no larger share than this


def effective_rank(s: torch.Tensor) -> float | None:
    """exp of the entropy, in nats, of s / Σs. s [k], descending."""
    return float(torch.special.entr(s / s.sum()).sum().exp()) if _any(s) else None


def participation_ratio(s: torch.Tensor) -> float | None:
    """(Σs²)² / Σs⁴. s [k], descending."""
    return float((squares := _squares(s)).sum().square() / squares.square().sum()) if _any(s) else None


def stable_rank(s: torch.Tensor) -> float | None:
    """Σs² / s₁². s [k], descending."""
    return float(_squares(s).sum()) if _any(s) else None


def gap(s: torch.Tensor) -> float | None:
    """(s₁ − s₂) / s₁; relative, because s₁ / s₂ has no value at rank 1. None without a second one. s [k], descending."""
    return float((s[0] - s[1]) / s[0]) if _any(s) and len(s) > 1 else None


def top_share(s: torch.Tensor) -> float | None:
    """s₁² / Σs². s [k], descending."""
    return float(1 / _squares(s).sum()) if _any(s) else None


def described_rank(s: torch.Tensor) -> float | None:
    """exp of −Σ p ln p over those p = s / Σs that are larger than KEPT. s [k], descending.

    A flat spectrum of more than 100 directions keeps none and has the rank 1; the number jumps where a p crosses KEPT."""
    if not _any(s):
        return None
    p = s / s.sum()
    return float(torch.special.entr(p[p > KEPT]).sum().exp())


NUMBERS: dict[str, Callable[[torch.Tensor], float | None]] = {
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "gap": gap,
    "top_share": top_share,
}


def _any(s: torch.Tensor) -> bool:
    return bool(s[0] > 0)


def _squares(s: torch.Tensor) -> torch.Tensor:
    return (s / s[0]).square()  # so that s may be as small or as large as numbers are


def singular_values(matrix: torch.Tensor) -> torch.Tensor | None:
    """All min(n, d) singular values of a matrix [n, d], descending, float64, on the CPU. None where an entry is not finite."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=_place(matrix))
    for rows in tall.split(ROWS):
        _add_gram(gram, float64(rows))
    return roots(gram)


def roots(gram: torch.Tensor) -> torch.Tensor | None:
    """Singular values of X, descending, from XᵀX [d, d], of which only the lower triangle is read. None where not finite."""
    if not gram.tril().isfinite().all():
        return None
    values = torch.linalg.eigvalsh(gram).flip(0).cpu()
    floor = len(values) ** 0.5 * torch.finfo(torch.float64).eps * values[0]
    return values.where(values > floor, 0.0).sqrt()


def float64(x: torch.Tensor) -> torch.Tensor:
    """x in float64, where it lies if that device has float64."""
    return x.detach().to(_place(x)).double()


def _place(x: torch.Tensor) -> torch.device:
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """gram += rowsᵀ·rows, in and below its diagonal blocks."""
    for start in range(0, rows.shape[1], COLUMNS):
        end = min(start + COLUMNS, rows.shape[1])
        gram[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])


class Moments:
    """Number, mean and scatter Σ(x − mean)(x − mean)ᵀ of rows x [d] that come in chunks and are not kept: 8·d² bytes.

    Rows are taken relative to the first one, so that rows which are all the same have no scatter at all. A scatter about a
    mean that moves loses nothing to cancellation, however far the mean is from zero; Σxxᵀ − n·mean·meanᵀ would. What
    comes out depends, in its last digits, on how the rows were cut into chunks.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.rows = 0
        self.origin = torch.zeros(width, dtype=torch.float64, device=device)  # the first row
        self.mean = torch.zeros_like(self.origin)  # of x − origin
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # only the lower triangle is meant

    def add(self, rows: torch.Tensor) -> None:
        """Takes in rows [n, d] of any floating type."""
        for some in rows.split(ROWS) if len(rows) else ():
            if not self.rows:
                self.origin = float64(some[0]).clone()
            x = some.detach().to(self.origin.device) - self.origin  # in float64
            mean = x.mean(0)
            _add_gram(self.scatter, x.sub_(mean))
            self._shift(len(x), mean - self.mean)

    def joined(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        if not self.rows:
            return other
        found = Moments(len(self.mean), self.mean.device)
        found.rows, found.origin, found.mean = self.rows, self.origin, self.mean.clone()
        found.scatter = self.scatter + other.scatter
        if other.rows:
            found._shift(other.rows, (other.origin - self.origin) + (other.mean - self.mean))
        return found

    def _shift(self, more: int, apart: torch.Tensor) -> None:
        """Counts in so many rows more, whose own scatter is there already and whose mean is so far from that of the others."""
        share = more / (self.rows + more)
        self.scatter.addr_(apart, apart, alpha=self.rows * share)
        self.mean = self.mean + apart * share
        self.rows += more

    def square_sum(self) -> float:
        """Σ‖x‖²."""
        return float(self.scatter.diagonal().sum() + self.rows * (self.origin + self.mean).square().sum())

    def centred(self) -> torch.Tensor | None:
        """Singular values [d] of the rows about their mean; see `roots`."""
        return roots(self.scatter)

    def uncentred(self) -> torch.Tensor | None:
        """Singular values [d] of the rows as they are; see `roots`."""
        mean = self.origin + self.mean
        return roots(self.scatter.addr(mean, mean, alpha=self.rows))
