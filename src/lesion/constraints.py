"""Weights that are held to a sign while they are trained: W = S ⊙ φ(V), where V is free.

    softplus      φ(V) = ln(1 + eᵛ)      V = W + ln(1 − e⁻ᵂ)
    exponential   φ(V) = eᵛ              V = ln W
    projected     φ(V) = V               and V ← max(V, 0) after every optimizer step (projected gradient descent)

Networks of non-negative weights and increasing activations are monotone in their input (Sill 1998). S is 1 everywhere, the
outer product of two vectors of signs (`lesion.signature`), or a sign for each entry. torch's own parametrizations compute W
from V whenever it is asked for; V is held in float32 whatever the model is held in, since the bfloat16 numbers near −3.9,
where the V of a typical weight lies, are 0.0156 apart.

An entry of 0 has no V in the first two forms and gets that of FLOOR times the root mean square of its matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from lesion.ffn import Ffn, is_turned, oriented

Form = Literal["softplus", "exponential", "projected"]
Signs = Literal["none", "outer", "each"]
FLOOR = 1e-3


def magnitude(v: torch.Tensor, form: Form) -> torch.Tensor:
    """φ(V) ≥ 0."""
    if form == "softplus":
        return F.softplus(v)
    return v.exp() if form == "exponential" else v


def inverse(w: torch.Tensor, form: Form) -> torch.Tensor:
    """V with φ(V) = w, in float32, for w ≥ 0 [...]. Raises ValueError where a V is not finite: w is negative, endless or no
    number, or all of it is zero."""
    w = w.double()
    if form != "projected":
        floor = FLOOR * float(w.square().mean().sqrt())
        w = w.clamp(min=floor)
        w = w + torch.log(-torch.expm1(-w)) if form == "softplus" else w.log()
    elif bool((w < 0).any()):
        w = torch.where(w < 0, torch.nan, w)
    v = w.float()
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"V overflows: {int((~torch.isfinite(v)).sum())} of {v.numel()} weights have no finite V under the form {form!r}; "
            "expected finite weights, not negative, and not all zero"
        )
    return v


class Signed(nn.Module):
    """The parametrization of one matrix: V ↦ S ⊙ φ(V), in the type that the model is held in."""

    rows: torch.Tensor
    columns: torch.Tensor
    each: torch.Tensor
    kind: torch.Tensor

    def __init__(self, module: Any, form: Form, signs: Signs):
        super().__init__()
        weight = module.weight
        self.form, self.signs, self.turned = form, signs, is_turned(module)
        out, into = oriented(module).shape
        self.register_buffer("kind", weight.new_empty(0))  # follows the model where its type is changed
        if signs == "outer":
            self.register_buffer("rows", torch.ones(out, dtype=torch.int8, device=weight.device))
            self.register_buffer("columns", torch.ones(into, dtype=torch.int8, device=weight.device))
        if signs == "each":
            self.register_buffer("each", torch.ones(weight.shape, dtype=torch.int8, device=weight.device))
        self.lift: torch.Tensor | None = None  # what an annealed constraint still adds to W
        self.left = 0.0

    def pattern(self) -> torch.Tensor | None:
        """S as it multiplies V; None where it is 1 everywhere."""
        if self.signs == "each":
            return self.each
        if self.signs == "none":
            return None
        found = self.rows[:, None] * self.columns
        return found.t() if self.turned else found

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast(v.device.type, enabled=False):
            w = magnitude(v, self.form)
            if (pattern := self.pattern()) is not None:
                w = w * pattern
            if self.lift is not None and self.left:
                w = w + self.left * self.lift
            return w.to(self.kind.dtype)


def hold(module: Any, form: Form, signs: Signs) -> None:
    """Registers the parametrization of a module's weight. The structure alone: V is filled in by whoever knows the weights, and
    until then is what W was."""
    parametrize.register_parametrization(module, "weight", Signed(module, form, signs), unsafe=True)
    module.parametrizations.weight.original = nn.Parameter(free(module).detach().float())


def signed(module: Any) -> Signed | None:
    """The parametrization of a module's weight, where it is one of ours."""
    found = module._modules.get("parametrizations")
    if found is None or "weight" not in found or len(found["weight"]) != 1:
        return None
    only = found["weight"][0]
    return only if isinstance(only, Signed) else None


def held(model: nn.Module) -> Iterator[tuple[str, Any, Signed]]:
    """Every module whose weight is held to a sign, with its name."""
    for name, module in model.named_modules():
        if (how := signed(module)) is not None:
            yield name, module, how


def class_of(module: nn.Module) -> type:
    """Its class, or what it was before its weight was held to a sign."""
    return type(module).__bases__[0] if signed(module) is not None else type(module)


def free(module: Any) -> nn.Parameter:
    """V."""
    found: nn.Parameter = module.parametrizations.weight.original
    return found


@torch.no_grad()
def project(model: nn.Module) -> None:
    """V ← max(V, 0) wherever the form is `projected`."""
    for _, module, how in held(model):
        if how.form == "projected":
            free(module).clamp_(min=0)


def materialise(model: nn.Module) -> None:
    """Makes every constrained weight a plain one again, of the value that it has. Raises ValueError for what no plain model
    can do: an activation that was changed."""
    if any(isinstance(m, (Envelope, Rectified)) for m in model.modules()):
        raise ValueError(
            "a plain model has no monotone activation: this one was constrained with activation='monotone'"
        )
    if any(held(model)):
        release(model)


def release(model: nn.Module) -> int:
    """Makes every constrained weight a plain one of the value that it has, and returns how many there were. Raises ValueError
    where there is none."""
    found = list(held(model))
    if not found:
        raise ValueError("nothing in this model is held to a sign; `constrain` does that")
    for _, module, _ in found:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return len(found)


class Envelope(nn.Module):
    """The monotone envelope of an activation with one minimum: a(max(x, x₀)), flat left of it; minus a(x₀) where the result must
    not be negative. GELU has its minimum at −0.7518, SiLU at −1.2785; ReLU is its own envelope."""

    def __init__(self, act: Any, positive: bool):
        super().__init__()
        self.act = act
        self.least, lowest = _minimum(act)
        self.below = lowest if positive else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.act(x.clamp(min=self.least)) - self.below
        return found.clamp(min=0) if self.below else found  # rounding at x₀ must not turn the sign


def _minimum(act: Any) -> tuple[float, float]:
    """(x₀, a(x₀)) on [−20, 20], by refining a grid in float64."""
    low, high = -20.0, 20.0
    with torch.no_grad():
        for _ in range(12):
            grid = torch.linspace(low, high, 401, dtype=torch.float64)
            values = act(grid)
            at = int(values.flip(0).argmin())  # of equal ones the rightmost: nothing is cut off a flat tail
            at = len(grid) - 1 - at
            step = float(grid[1] - grid[0])
            low, high = float(grid[at]) - step, float(grid[at]) + step
        return float(grid[at]), float(values[at])


class Rectified(nn.Linear):
    """max(x·Wᵀ + b, 0): the second factor of a gated network, which must not be negative for the product to be monotone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(min=0)


def make_monotone(ffn: Ffn) -> None:
    """Replaces the activation by its monotone envelope; in a gated network also rectifies the other factor."""
    if isinstance(ffn.act, Envelope):
        raise ValueError(f"the activation of {ffn.item} is monotone already")
    setattr(ffn.owner, ffn.activation, Envelope(ffn.act, positive=ffn.gate is not None))
    if ffn.gate is not None:
        if type(ffn.into) is not nn.Linear:
            raise ValueError(f"a {type(ffn.into).__name__} cannot be rectified; expected a plain Linear")
        ffn.into.__class__ = Rectified
