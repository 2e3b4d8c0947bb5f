"""Monotonicity of feed-forward networks in their own input: is what was constrained really so, and what does that give?

For each network f (`lesion.ffn`), behind the norm, with the order x ≤ₛ y ⇔ s ⊙ (y − x) ≥ 0 of its sign structure (s = 1
without one):

    weights    effective weights that are held to a sign, how many there are and how many have the wrong one
    pairs      share of pairs x ≤ₛ x + δ, δ = s ⊙ |ε|·σ, with f(x + δ) ≥ₛ f(x) violated in some coordinate, and of coordinates
    jacobian   share of entries of ∂f/∂x whose sign is not sₖ·sᵢ, other than 0

on inputs that the model reaches on real text, and on random ones of the same mean and spread in each coordinate. All in
float64, where a coordinate counts as violated below −10⁻⁹ of the output's size. A network that is not constrained is measured
in the same way, as a control. Norms and attention are not monotone, and nothing is said of the whole model (Sill 1998;
Daniels & Velikova 2010).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from pydantic import Field

from lesion.constraints import signed
from lesion.ffn import Ffn, ffns, oriented
from lesion.likelihood import padded
from lesion.stats import generator
from lesion.texts import corpus, corpus_digest
from lesion.trial import Measure, Row, Specimen

TOLERANCE = 1e-9


class Monotonicity(Measure):
    """Signs of effective weights, ordered pairs and Jacobian signs, one row a network."""

    chunk = 1024  # all networks of a tower are listened to in one forward

    corpus: str = Field(default="austen", description="text that gives the inputs: a packaged corpus or a file")
    documents: int = Field(default=4, ge=1, description="first so many documents")
    tokens: int = Field(default=64, ge=2, description="first so many tokens of each document")
    pairs: int = Field(default=64, ge=1, description="ordered pairs for each network and kind of input")
    points: int = Field(default=2, ge=1, description="inputs at which the Jacobian is taken")
    spread: float = Field(default=0.5, gt=0, description="σ of δ, in standard deviations of each coordinate")
    needed: bool = Field(default=True, description="whether a model in which nothing is constrained is an error")
    seed: int = Field(default=0, ge=0, description="of pairs and points")
    sha256: str | None = Field(default=None, description="digest of the corpus; filled in when the reading is pinned")

    def pin(self) -> Self:
        return self.with_digest(f"corpus {self.corpus!r}", corpus_digest(self.corpus))

    def size(self) -> tuple[int, int]:
        return 32, self.documents * self.tokens

    def items(self, specimen: Specimen) -> list[str]:
        return [ffn.item for ffn in ffns(specimen.model)]

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        networks = {ffn.item: ffn for ffn in ffns(specimen.model)}
        if self.needed and not any(signed(m) for ffn in networks.values() for m in ffn.parts.values()):
            raise ValueError("no weight of any feed-forward network is constrained: there is nothing to certify")
        reached = self._reached(specimen, list(networks.values()))
        rows = []
        for item in items:
            started, ffn = time.perf_counter(), networks[item]
            row: Row = {"item": item, "tower": ffn.tower, "layer": ffn.layer, **signs(ffn)}
            row |= self._order(ffn, reached[item])
            rows.append({**row, "duration": time.perf_counter() - started})
        return rows

    def _order(self, ffn: Ffn, x: torch.Tensor) -> Row:
        if not bool(torch.isfinite(x).all()):
            return {"outcome": "not finite"} | dict.fromkeys(
                f"{w}_{kind}" for w in NAMES for kind in ("reached", "random")
            )
        drawn = generator("monotonicity", self.seed, ffn.item)
        f, jacobian, stream = computed(ffn)
        mean, deviation = x.mean(0), x.std(0).clamp(min=1e-12)
        at = torch.from_numpy(drawn.integers(0, len(x), self.pairs))
        chance = mean + deviation * torch.from_numpy(drawn.standard_normal((self.pairs, x.shape[1])))
        step = stream * torch.from_numpy(abs(drawn.standard_normal((self.pairs, x.shape[1])))) * deviation * self.spread
        row: Row = {"outcome": "measured"}
        for kind, given in (("reached", x[at]), ("random", chance)):
            values = (
                *pair_violations(f, given, step, stream),
                *jacobian_violations(jacobian, given[: self.points], stream),
            )
            row |= {f"{name}_{kind}": value for name, value in zip(NAMES, values, strict=True)}
        return row

    def _reached(self, specimen: Specimen, networks: Sequence[Ffn]) -> dict[str, torch.Tensor]:
        """Inputs of every network on text [N, D], in float64, without each first token, unlike others in size."""
        from lesion.inference import inference

        assert specimen.tokenizer is not None
        texts = [d.text for d in corpus(self.corpus)[: self.documents]]
        tokens = [ids[: self.tokens] for ids in specimen.tokenizer(texts, verbose=False)["input_ids"]]
        tokens = [ids for ids in tokens if len(ids) > 1]
        if not tokens:
            raise ValueError(f"no document of {self.corpus!r} has two tokens")
        ids = padded(tokens).to(specimen.model.device)
        heard: dict[str, torch.Tensor] = {}

        def listener(item: str) -> Callable[..., None]:
            def listen(module: Any, given: Any) -> None:
                heard[item] = given[0].detach().reshape(len(tokens), -1, given[0].shape[-1])

            return listen

        more = {"decoder_input_ids": ids} if specimen.model.config.is_encoder_decoder else {}
        hooks = [ffn.into.register_forward_pre_hook(listener(ffn.item)) for ffn in networks]
        try:
            with inference(specimen.model):  # which leaves alone what is listened to
                specimen.model(input_ids=ids, use_cache=False, **more)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            item: torch.cat([x[row, 1 : len(text)] for row, text in enumerate(tokens)]).double().cpu()
            for item, x in heard.items()
        }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Weights that were checked and that have the wrong sign, over all networks; mean shares of violations."""
        found: dict[str, Any] = {name: sum(row[name] for row in rows) for name in ("constrained", "checked", "wrong")}
        good = [row for row in rows if row["outcome"] == "measured"]
        for kind in ("reached", "random"):
            for name in NAMES:
                values = [row[f"{name}_{kind}"] for row in good]
                found[f"{name}_{kind}"] = math.fsum(values) / len(values) if values else None
        return {**found, "networks": len(rows), "not_finite": len(rows) - len(good)}


NAMES = ("pairs", "coordinates", "jacobian")


def signs(ffn: Ffn) -> Row:
    """How many matrices of a network are held to a sign, and their effective weights: how many, how many are wrong, and the
    least one, each turned by the sign that it is held to."""
    checked = wrong = constrained = 0
    least = math.inf
    for module in ffn.parts.values():
        if (how := signed(module)) is None or how.signs == "each":
            continue
        pattern = how.pattern()
        turned = module.weight.detach() if pattern is None else module.weight.detach() * pattern
        constrained, checked = constrained + 1, checked + turned.numel()
        wrong += int((~(turned >= 0)).sum())  # NaN is wrong too
        least = min(least, float(turned.min()))
    return {"constrained": constrained, "checked": checked, "wrong": wrong, "least": least if checked else None}


Function = Callable[[torch.Tensor], torch.Tensor]


def computed(ffn: Ffn) -> tuple[Function, Function, torch.Tensor]:
    """A network in float64 on the CPU: f [N, D] → [N, D], its Jacobian [N, D] → [N, D out, D in], and its signs s [D]."""
    into, gate, out = ffn.into, ffn.gate, ffn.out
    weights = {id(m): oriented(m).detach().double().cpu() for m in (into, gate, out) if m is not None}
    rectified = type(into).__name__.endswith("Rectified")

    def linear(module: Any, x: torch.Tensor) -> torch.Tensor:
        found = x @ weights[id(module)].t()
        return found if module.bias is None else found + module.bias.detach().double().cpu()

    def factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = linear(into, x)
        first = first.clamp(min=0) if rectified else first
        return (first, None) if gate is None else (first, linear(gate, x))

    def f(x: torch.Tensor) -> torch.Tensor:
        first, second = factors(x)
        return linear(out, ffn.act(first) if second is None else ffn.act(second) * first)

    def jacobian(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            first, second = (None if part is None else part.detach().requires_grad_() for part in factors(x))
            assert first is not None
            turning = first if second is None else second
            value = ffn.act(turning)
            (slope,) = torch.autograd.grad(value.sum(), turning)
        if second is None:
            return (weights[id(out)] * slope[:, None]) @ weights[id(into)]
        open_ = (first > 0).double() if rectified else torch.ones_like(first)
        return (weights[id(out)] * (slope * first).detach()[:, None]) @ weights[id(gate)] + (
            weights[id(out)] * (value.detach() * open_)[:, None]
        ) @ weights[id(into)]

    how = signed(into)
    stream = torch.ones(weights[id(into)].shape[1], dtype=torch.float64)
    if how is not None and how.signs == "outer":
        stream = how.columns.double().cpu()
    return f, jacobian, stream


@torch.no_grad()
def pair_violations(f: Function, x: torch.Tensor, step: torch.Tensor, stream: torch.Tensor) -> tuple[float, float]:
    """Share of pairs (x, x + step) [N, D] with some coordinate of s ⊙ (f(x + step) − f(x)) below 0, and share of coordinates."""
    below, above = f(x), f(x + step)
    size = torch.maximum(below.abs().amax(-1, keepdim=True), above.abs().amax(-1, keepdim=True))
    violated = stream * (above - below) < -TOLERANCE * size
    return float(violated.any(-1).double().mean()), float(violated.double().mean())


def jacobian_violations(jacobian: Function, x: torch.Tensor, stream: torch.Tensor) -> tuple[float]:
    """Share of entries (k, i) of the Jacobians at x with sₖ·sᵢ·∂fₖ/∂xᵢ below 0."""
    found = jacobian(x) * stream[:, None] * stream
    return (float((found < -TOLERANCE * found.abs().amax((-1, -2), keepdim=True)).double().mean()),)
