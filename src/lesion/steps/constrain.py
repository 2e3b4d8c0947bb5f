"""Constraint: matrices are held to a sign, so that feed-forward networks are monotone in their own input.

W = S ⊙ φ(V) with V free (`lesion.constraints`), as described W = softplus(V) of V = softplus⁻¹(|W|). What becomes of the
weights that were there is the choice that matters: |W| is farther from W than 0 is, since ‖|W| − W‖² ≈ 2‖W‖² where clamping
leaves ½‖W‖². Monotone networks: Sill (1998); Daniels & Velikova (2010). Nothing is claimed of the whole model: norms and
attention are not monotone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from lesion.constraints import Form, Signed, free, hold, inverse, make_monotone, signed
from lesion.ffn import Ffn, ffns, oriented
from lesion.signature import signature
from lesion.sites import View, parse, resolve
from lesion.trial import Specimen, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = ("mlp", "attention", "cross")


class Constrain(Step):
    """Holds whole matrices of a site to a sign. What is not addressed, biases too, stays free.

    abs           |W|, as described: every weight positive
    clamp         max(W, 0): the nearest non-negative matrix
    signature     a sign structure for each network, chosen to keep the most: monotone in the order x ≤ₛ y
    sign-frozen   control: W itself, whose signs can no longer change; nothing is monotone
    abs-free      control: |W| with nothing held; the damage without the constraint
    """

    keeps: ClassVar[bool] = True

    site: str = Field(default="mlp", description="whole matrices: mlp.in, mlp, mlp+attention.output, mlp.in+mlp.out, …")
    init: Literal["abs", "clamp", "signature", "sign-frozen", "abs-free"] = Field(
        default="abs", description="what becomes of the weights that are there"
    )
    form: Form = Field(default="softplus", description="softplus, exponential, or projected onto V ≥ 0 after each step")
    activation: Literal["keep", "monotone"] = Field(
        default="keep", description="monotone: its monotone envelope; a gated network's other factor is rectified"
    )
    starts: int = Field(default=8, ge=0, description="random starts of the search for a sign structure")
    seed: int = Field(default=0, ge=0, description="of these starts")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.init == "abs-free" and self.form != "softplus":
            raise ValueError(f"form={self.form!r} has no meaning for init='abs-free', which holds nothing")
        if self.init != "signature" and self.seed:
            raise ValueError(f"seed={self.seed} has a meaning for init='signature' only, not for {self.init!r}")
        if any(term.heads for term in parse(self.site)):
            raise ValueError(f"whole matrices are held to a sign, so the site must not name heads; got {self.site!r}")
        return self

    def attach(self, model: PreTrainedModel) -> None:
        self._attach(model, self._modules(model))

    def _attach(self, model: PreTrainedModel, modules: dict[str, Any]) -> None:
        if self.activation == "monotone":
            for ffn in self._networks(model, modules):
                make_monotone(ffn)
        if self.init != "abs-free":
            for module in modules.values():
                hold(module, self.form, {"signature": "outer", "sign-frozen": "each"}.get(self.init, "none"))  # type: ignore[arg-type]

    def touches(self, specimen: Specimen) -> list[str]:
        return [view.name for view in self._views(specimen.model)]

    @torch.no_grad()
    def apply(self, specimen: Specimen) -> dict[str, Any]:
        modules = self._modules(specimen.model)
        networks = self._networks(specimen.model, modules)
        before = {name: oriented(module).detach().clone() for name, module in modules.items()}
        self._attach(specimen.model, modules)
        if self.init == "abs-free":
            for module in modules.values():
                module.weight.abs_()
        else:
            if self.init == "signature":
                self._choose_signs(modules, before, networks)
            for name, module in modules.items():
                how = signed(module)
                assert how is not None
                self._fill(module, how, before[name])
        return self._facts(modules, before)

    def _fill(self, module: Any, how: Signed, weight: torch.Tensor) -> None:
        """Finds V for the weights that were there, [out, in]."""
        weight = weight.t() if how.turned else weight
        if self.init == "sign-frozen":
            how.each.copy_(torch.where(weight < 0, -1, 1))
        pattern = how.pattern()
        agreeing = weight.abs() if self.init == "abs" else weight if pattern is None else weight * pattern
        free(module).copy_(inverse(agreeing.clamp(min=0), self.form))

    def _choose_signs(self, modules: dict[str, Any], before: dict[str, torch.Tensor], networks: list[Ffn]) -> None:
        """Each network has one structure; a matrix that belongs to none has one of its own."""
        names = {id(module): name for name, module in modules.items()}
        left = dict(modules)
        for ffn in networks:
            here = {part: names[id(m)] for part, m in ffn.parts.items() if id(m) in names}
            turned = [before[n] if part != "mlp.out" else before[n].t() for part, n in here.items()]
            found = signature(turned, self.starts, self.seed)
            units, stream = found.units.to(torch.int8), found.stream.to(torch.int8)
            for part, name in here.items():
                how = signed(left.pop(name))
                assert how is not None
                how.rows.copy_(stream if part == "mlp.out" else units)
                how.columns.copy_(units if part == "mlp.out" else stream)
        for name, module in left.items():
            found, how = signature([before[name]], self.starts, self.seed), signed(module)
            assert how is not None
            how.rows.copy_(found.units)
            how.columns.copy_(found.stream)

    def _facts(self, modules: dict[str, Any], before: dict[str, torch.Tensor]) -> dict[str, Any]:
        """How many weights there are, and what of them is left: of Σw² the share of those that stayed, and the distance
        √(Σ(w' − w)² / Σw²)."""
        square = kept = moved = 0.0
        weights = 0
        for name, module in modules.items():
            old, new = before[name].double(), oriented(module).detach().double()
            weights += old.numel()
            square += float(old.square().sum())
            kept += float(old[(old.sign() == new.sign()) & (new.abs() > 0.5 * old.abs())].square().sum())
            moved += float((new - old).square().sum())
        if not (square > 0 and math.isfinite(moved)):
            raise ValueError(
                f"nothing is constrained: {weights} weights of {self.site!r}, whose squares sum to {square}"
            )
        distance = math.sqrt(moved / square)
        return {"matrices": len(modules), "weights": weights, "retained": kept / square, "relative": distance}

    def _views(self, model: PreTrainedModel) -> list[View]:
        views = resolve(model, self.site)
        if strange := [view.part for view in views if view.part.partition(".")[0] not in ROLES]:
            raise ValueError(
                f"matrices of mlp and attention are held to a sign; the site {self.site!r} has {strange[0]} too"
            )
        return views

    def _modules(self, model: PreTrainedModel) -> dict[str, Any]:
        """The modules of a site by their names. ValueError where a view is a part of one only."""
        named, found = dict(model.named_parameters()), {}
        for view in self._views(model):
            if view.tensor.numel() != named[view.name].numel():
                raise ValueError(
                    f"whole matrices are held to a sign, and {view.part} is a part of {view.name} in this family"
                )
            path = view.name.removesuffix(".weight")
            found[path] = model.get_submodule(path)
        return found

    def _networks(self, model: PreTrainedModel, modules: dict[str, Any]) -> list[Ffn]:
        """Feed-forward networks of which the site has a matrix."""
        here = {id(module) for module in modules.values()}
        return [ffn for ffn in ffns(model, towers=True) if any(id(part) in here for part in ffn.parts.values())]
