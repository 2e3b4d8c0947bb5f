"""Eigenpairs and spectral density of a large symmetric operator that is known by its products only.

    top         Lanczos with full reorthogonalisation and thick restart (Lanczos 1950; Wu & Simon 2000)
    density     stochastic Lanczos quadrature (Golub & Welsch 1969; Ubaru, Chen & Saad 2017)
    near_null   Chebyshev filtering around zero, then Rayleigh and Ritz (Di Napoli, Polizzi & Saad 2016)

Classical Lanczos loses orthogonality and finds an eigenvalue several times (Paige 1976); here every new vector is made orthogonal
to all others twice. A Ritz pair (θ, y) has the residual ‖A y − θ y‖, which bounds the distance of θ from an eigenvalue.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

Times = Callable[[torch.Tensor], torch.Tensor]
COLUMNS = 2**22  # of a basis that are turned at a time
SPARE = 0.1  # share of the memory that is free which is left alone


class Unfound(ValueError):
    """There is nothing to be found of this operator. `outcome`: "not finite", "not converged", or "flat" where it is zero; what a
    row says of a damaged model, of which that is a finding and no failure."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.outcome = outcome


@dataclass
class Pairs:
    """Eigenvalues of largest magnitude first [k], eigenvectors as rows [k, N], residuals [k] by Lanczos' own estimate, how many
    products were made, and whether the basis lay on disk."""

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor
    products: int
    on_disk: bool


@dataclass
class Density:
    """Nodes and weights [probes, steps] of a quadrature of the density of eigenvalues; weights of a probe sum to 1."""

    nodes: torch.Tensor
    weights: torch.Tensor

    def share(self, low: float, high: float) -> list[float]:
        """Of all eigenvalues the share in [low, high], as each probe has it."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return [float(w) for w in (self.weights * inside).sum(1)]

    def trace(self, size: int) -> list[float]:
        """Σ of all eigenvalues, as each probe has it (Hutchinson 1990)."""
        return [float(x) * size for x in (self.nodes * self.weights).sum(1)]


def room(
    rows: int, size: int, like: torch.Tensor, budget: float | None, folder: Path | None = None
) -> tuple[torch.Tensor, bool]:
    """An empty basis [rows, size], in memory where it fits into `budget` bytes (None: what is free), else in a file that vanishes
    with it. Raises ValueError where it fits nowhere; on an accelerator it has to fit."""
    need = rows * size * like.element_size()
    if like.device.type == "cuda" and need > (here := torch.cuda.mem_get_info(like.device)[0] * (1 - SPARE)):
        raise ValueError(
            f"{rows} vectors of {size:,} numbers are {need / 2**30:.1f} GiB, and {here / 2**30:.1f} GiB are free on "
            f"{like.device}: ask for fewer directions or a smaller site"
        )
    if like.device.type != "cpu":
        return torch.empty(rows, size, dtype=like.dtype, device=like.device), False
    free = psutil.virtual_memory().available * (1 - SPARE)
    if need <= (free if budget is None else budget):
        return torch.empty(rows, size, dtype=like.dtype), False
    place = Path(tempfile.gettempdir() if folder is None else folder)
    disk = shutil.disk_usage(place).free
    if need > disk * (1 - SPARE):
        raise ValueError(
            f"{rows} vectors of {size:,} numbers are {need / 2**30:.1f} GiB: more than the memory allowed and the "
            f"{disk / 2**30:.1f} GiB free in {place}; ask for fewer directions or a smaller site"
        )
    with tempfile.NamedTemporaryFile(dir=place, prefix="lesion-basis-") as file:  # its memory stays mapped
        return torch.from_file(file.name, shared=True, size=rows * size, dtype=like.dtype).view(rows, size), True


def orthogonal(w: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w without its part in the span of orthonormal rows [j, N], and the coefficients of that part [j]: Gram and Schmidt twice,
    which is enough (Giraud et al. 2005)."""
    total = torch.zeros(len(basis), dtype=w.dtype, device=w.device)
    for _ in range(2):
        part = basis @ w
        w = torch.addmv(w, basis.T, part, alpha=-1)
        total += part
    return w, total


def top(
    times: Times,
    start: torch.Tensor,
    k: int,
    *,
    tolerance: float = 1e-3,
    width: int = 0,
    restarts: int = 20,
    budget: float | None = None,
    folder: Path | None = None,
) -> Pairs:
    """The k eigenpairs of largest magnitude, from a start vector [N], until residuals are below tolerance·|θ₁| or there have been
    `restarts`. `width`: vectors that are held (0: k and as many again, 20 at the least).

    Raises ValueError where k is more than the operator has, or the products are not finite.
    """
    size = len(start)
    if not 1 <= k <= size:
        raise ValueError(f"{k} eigenpairs were asked for, of an operator of {size} numbers")
    width = width_of(k, size, width)
    basis, on_disk = room(width + 1, size, start, budget, folder)
    small = torch.zeros(width, width, dtype=torch.float64)
    basis[0] = start / start.norm()
    held = products = 0
    norm = 0.0
    for left in range(restarts, -1, -1):
        j = held
        while j < width:
            w = times(basis[j])
            products += 1
            w, coefficients = orthogonal(w, basis[: j + 1])
            small[: j + 1, j] = coefficients.double().cpu()
            small[j, :j] = small[:j, j]
            norm = float(w.norm())
            if not norm < float("inf"):
                raise Unfound("not finite", "a product with the operator is not finite")
            scale = float(small[: j + 1, : j + 1].abs().max())
            j += 1
            if (
                norm <= 1e-7 * max(scale, 1e-30) or j == size
            ):  # an invariant space: all that can be found from this start
                norm = 0.0
                break
            basis[j] = w / norm
            if j >= k + 1 and (j - held) % 5 == 0 and _converged(small[:j, :j], norm, k, tolerance):
                break
        values, turn = torch.linalg.eigh(small[:j, :j])
        order = values.abs().argsort(descending=True)
        values, turn = values[order], turn[:, order]
        residuals = norm * turn[-1].abs()
        if left == 0 or norm == 0.0 or bool((residuals[:k] <= tolerance * values.abs()[0]).all()):
            break
        held = min(k + (width - k) // 3, j - 1)
        _turn(basis, turn[:, :held], j)
        basis[held] = basis[j]
        small.zero_()
        small[:held, :held] = torch.diag(values[:held])
    found = min(k, j)
    _turn(basis, turn[:, :found], j)
    vectors = basis[:found] if on_disk else basis[:found].clone()  # the rest of the basis can go
    return Pairs(values[:found], vectors, residuals[:found], products, on_disk)


def width_of(k: int, size: int, width: int = 0) -> int:
    """Vectors that are held for k eigenpairs of an operator on [size]."""
    return min(size, max(width or max(2 * k, 20), k + 2))


def _converged(small: torch.Tensor, norm: float, k: int, tolerance: float) -> bool:
    values, turn = torch.linalg.eigh(small)
    order = values.abs().argsort(descending=True)[:k]
    return bool((norm * turn[-1, order].abs() <= tolerance * values.abs().max()).all())


def _turn(basis: torch.Tensor, by: torch.Tensor, rows: int) -> None:
    """basis[:m] ← byᵀ · basis[:rows], in place, for by [rows, m]."""
    by = by.to(basis.dtype).to(basis.device)
    for first in range(0, basis.shape[1], COLUMNS):
        part = basis[:rows, first : first + COLUMNS]
        basis[: by.shape[1], first : first + COLUMNS] = by.T @ part


def density(
    times: Times,
    size: int,
    probes: int,
    steps: int,
    stream: torch.Generator,
    like: torch.Tensor,
    budget: float | None = None,
) -> Density:
    """Quadrature of the density of eigenvalues of an operator on [size], from random signs; `budget` as in `top`.

    Raises ValueError for products that
    are not finite."""
    nodes, weights = torch.zeros(probes, steps, dtype=torch.float64), torch.zeros(probes, steps, dtype=torch.float64)
    for probe in range(probes):
        start = torch.randint(0, 2, (size,), generator=stream).to(like) * 2 - 1
        values, mass = _quadrature(times, start / size**0.5, min(steps, size), budget)
        nodes[probe, : len(values)], weights[probe, : len(values)] = values, mass
    return Density(nodes, weights)


def _quadrature(
    times: Times, start: torch.Tensor, steps: int, budget: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    basis, _ = room(steps, len(start), start, budget)
    basis[0] = start
    small = torch.zeros(steps, steps, dtype=torch.float64)
    done = steps
    for j in range(steps):
        w, coefficients = orthogonal(times(basis[j]), basis[: j + 1])
        small[j, j] = float(coefficients[j])
        norm = float(w.norm())
        if not norm < float("inf"):
            raise Unfound("not finite", "a product with the operator is not finite")
        if j + 1 == steps or norm <= 1e-7 * float(small.abs().max()):
            done = j + 1
            break
        small[j, j + 1] = small[j + 1, j] = norm
        basis[j + 1] = w / norm
    values, vectors = torch.linalg.eigh(small[:done, :done])
    return values, vectors[0].square()


def near_null(
    times: Times, block: torch.Tensor, largest: float, degree: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors near the null space of an operator whose eigenvalues lie within ±largest, from a block [b, N] of random ones:
    Rayleigh quotients nearest zero first [b], vectors [b, N], residuals ‖A x − θ x‖ [b].

    The filter is the Chebyshev series of a delta at zero, damped by Jackson's factors (Weiße et al. 2006): about π/degree wide,
    in units of `largest`. Single null vectors of a large operator cannot be told apart; what is found is some of their span.
    """
    m = degree + 1
    k = torch.arange(m, dtype=torch.float64)
    jackson = (
        (m - k + 1) * torch.cos(torch.pi * k / (m + 1))
        + torch.sin(torch.pi * k / (m + 1)) / torch.tan(torch.tensor(torch.pi / (m + 1)))
    ) / (m + 1)
    series = jackson * torch.cos(k * torch.pi / 2) * torch.where(k == 0, 1.0, 2.0)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([times(row) for row in x]) / (1.05 * largest)

    before, now = block, scaled(block)
    total = float(series[0]) * before + float(series[1]) * now
    for number in range(2, m):
        before, now = now, 2 * scaled(now) - before
        if series[number]:
            total = total + float(series[number]) * now
    if not bool(total.isfinite().all()):
        raise Unfound("not finite", "what the filter leaves of random vectors is not finite")
    rows, _ = torch.linalg.qr(total.T)
    rows = rows.T.contiguous()
    moved = torch.stack([times(row) for row in rows])
    values, turn = torch.linalg.eigh((rows @ moved.T).double())
    order = values.abs().argsort()
    values, turn = values[order], turn[:, order].to(rows.dtype)
    vectors, moved = turn.T @ rows, turn.T @ moved
    return values, vectors, (moved - values.to(rows.dtype)[:, None] * vectors).norm(dim=1).double()


def flat_share(gradient: torch.Tensor, steep: torch.Tensor) -> float:
    """‖P g‖² / ‖g‖², P the projection off the orthonormal rows `steep` [k, N]: how much of a gradient lies in flat directions.
    Raises ValueError for a gradient of zero, which lies nowhere."""
    total = float(gradient.double().square().sum())
    if not 0 < total < float("inf"):
        outcome = "flat" if total == 0 else "not finite"
        raise Unfound(outcome, f"a gradient whose squares sum to {total} has no direction")
    return 1 - float((steep @ gradient).double().square().sum()) / total
