"""HotFlip: how far a few changed tokens of a text raise the loss of what follows it, which nobody changed (Ebrahimi et al. 2018,
"HotFlip: White-box adversarial examples for text classification").

    rise(n) = loss(targets | text with n flipped tokens) − loss(targets | text)        nats a target token

A share of the clean loss is another rise for each model (15 % is 0.29 nats at a perplexity of 6.7 and 0.55 at 36), so rows have
the loss after every flip and success is computed of them for any threshold (`lesion.flipping.success`). Attacks that use
gradients are read beside those that do not, `random`, `query` and the replayed flips of another model: a model that only
hides its gradients is no robust one (Athalye et al. 2018).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lesion.excerpts import Excerpt, OfExcerpts
from lesion.trial import Reading, Row, Specimen

RELATIVE = 0.15  # the described threshold
ABSOLUTE = (0.1, 0.25, 0.5, 1.0)  # nats


class Hotflip(OfExcerpts):
    """Loss after 0, 1, …, `flips` flipped tokens; one row a document or question.

    A row has the attacked tokens (`text_ids`) and the scored ones (`target_ids`), the flips in their order (`positions` in
    text_ids, new `ids`), `losses` after 0, 1, … of them, whether the text is read as the same tokens then (`stable_after`),
    and what was spent: true losses (`scorings`) and `gradients`. Of random flips it is the best draw; all are in `draws`.
    """

    chunk = 4

    manner: Literal["described", "iterative", "random", "query", "replay"] = Field(
        default="iterative",
        description="described: one gradient, true loss never looked at; iterative: best true loss of first-order "
        "candidates, flip by flip; random: a control; query: iterative without gradients; replay: another's flips",
    )
    flips: int = Field(default=10, ge=1, description="tokens that are changed at most, each at another position")
    candidates: int = Field(default=64, ge=1, description="changes that are tried for a flip (iterative, query)")
    each: int = Field(default=4, ge=1, description="of these at most so many at one position")
    draws: int = Field(default=8, ge=1, description="random changes, of which the best is kept (random)")
    stable: bool = Field(
        default=False, description="only flips whose text, written out and read again, is the same tokens"
    )
    replay: Reading | None = Field(default=None, description="whose flips of the same texts are tried (replay)")
    seed: int = Field(default=0, ge=0, description="of random positions and tokens")

    @model_validator(mode="after")
    def _replays(self) -> Self:
        if (self.manner == "replay") != (self.replay is not None):
            raise ValueError(
                f"manner='replay' and a reading to replay go together, not {self.manner!r} and {self.replay}"
            )
        if self.replay is not None and not isinstance(self.replay.measure, Hotflip):
            raise ValueError(f"the flips to replay are those of a hotflip reading, not of {self.replay.measure.name!r}")
        return self

    def size(self) -> tuple[int, int] | None:
        found = super().size()
        tried = {"described": 1, "replay": 1, "random": self.draws}.get(self.manner, self.candidates)
        return found and (found[0], found[1] * self.flips * tried)

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        from lesion.inference import inference

        excerpts, rows = self.excerpts(specimen, items), []
        quoted = {row["item"]: row for row in self._quoted(specimen)}
        with inference(specimen.model):  # arranged once for all scorings
            for item in items:
                started = time.perf_counter()
                row = self._row(specimen, item, excerpts[item], quoted.get(item))
                rows.append({**row, "duration": time.perf_counter() - started})
        return rows

    def _quoted(self, specimen: Specimen) -> list[Row]:
        if self.replay is None:
            return []
        assert specimen.recall is not None, "the walk recalls what is quoted"
        return specimen.recall(self.replay)

    def _row(self, specimen: Specimen, item: str, excerpt: Excerpt, quoted: Row | None) -> Row:
        from lesion import flipping, flips

        row: Row = {"item": item, "group": excerpt.group, "outcome": "empty", "tokens": 0, "text_ids": None}
        row |= dict.fromkeys(("target_ids", "positions", "ids", "losses", "draws", "stable", "stable_after"))
        row |= {"scorings": None, "gradients": None}
        if (passage := excerpt.passage) is None:
            return row
        row |= {"text_ids": list(passage.attacked), "target_ids": list(passage.targets)}
        row |= {"tokens": len(passage.targets), "outcome": "not finite"}
        if not math.isfinite(flipping.curve(specimen.model, passage, [])[0]):
            return row
        may = flips.allowed(specimen.tokenizer, len(flips.table(specimen.model)))
        reads = lambda tokens: flips.stable(specimen.tokenizer, tokens)  # noqa: E731
        at = sorted({*excerpt.words}.intersection(flips.attackable(passage, may)))
        found = self._attack(specimen, passage, flipping.Reach(tuple(at), may, reads if self.stable else None), quoted)
        if found is None:
            return row | {"outcome": "nothing to replay"}
        losses = flipping.curve(specimen.model, passage, found.flips)
        draws = found.draws and [flipping.curve(specimen.model, passage, drawn) for drawn in found.draws]
        if not all(map(math.isfinite, [*losses, *(loss for drawn in draws or () for loss in drawn)])):
            return row
        stable = [reads(flipping.flipped(passage.attacked, found.flips[:n])) for n in range(len(losses))]
        return row | {
            "outcome": "attacked",
            "positions": [position for position, _ in found.flips],
            "ids": [id for _, id in found.flips],
            "losses": losses,
            "draws": draws,
            "stable": stable[-1],
            "stable_after": stable,  # 0, 1, … flips
            "scorings": found.scorings,
            "gradients": found.gradients,
        }

    def _attack(self, specimen: Specimen, passage: Any, reach: Any, quoted: Row | None) -> Any:
        from lesion import flipping

        model, place = specimen.model, (self.seed, passage.item)
        match self.manner:
            case "described":
                return flipping.described(model, passage, reach, self.flips)
            case "iterative":
                return flipping.iterative(model, passage, reach, self.flips, self.candidates, self.each)
            case "query":
                return flipping.query(model, passage, reach, self.flips, self.candidates, self.each, place)
            case "random":
                return flipping.at_random(model, passage, reach, self.flips, self.draws, place)
        if quoted is None:
            raise ValueError(f"the reading to replay has no row for {passage.item!r}")
        if quoted["positions"] is None:
            return None
        if [*passage.attacked, *passage.targets] != [*quoted["text_ids"], *quoted["target_ids"]]:
            raise ValueError(f"{passage.item!r} is not the same tokens here as in the reading to replay")
        made = zip(quoted["positions"], quoted["ids"], strict=True)
        return flipping.Attack(list(made)[: self.flips])

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Means over the texts that were attacked; success is the share of them, after all flips."""
        from lesion.flipping import success

        good = [row for row in rows if row["outcome"] == "attacked"]
        curves = [row["losses"] for row in good]

        def mean(values: Sequence[float]) -> float | None:
            return math.fsum(values) / len(values) if values else None

        def share(curves: Sequence[Sequence[float]], threshold: float, relative: bool = False) -> float | None:
            return mean([success(losses, self.flips, threshold, relative) for losses in curves])

        found = {
            "loss": mean([losses[0] for losses in curves]),
            "attacked": mean([losses[-1] for losses in curves]),
            "increase": mean([losses[-1] - losses[0] for losses in curves]),
            "success_relative": share(curves, RELATIVE, relative=True),
            **{f"success_{threshold:g}": share(curves, threshold) for threshold in ABSOLUTE},
            "flips": mean([len(row["ids"]) for row in good]),
            "stable": mean([row["stable"] for row in good]),
            "scorings": sum(row["scorings"] for row in good),
            "n": len(good),
            "not_finite": sum(row["outcome"] == "not finite" for row in rows),
            "unattacked": sum(row["outcome"] in ("empty", "nothing to replay") for row in rows),
        }
        if self.manner == "random":  # of which the rest tells the best draw
            drawn = [losses for row in good for losses in row["draws"]]
            found |= {
                "mean_increase": mean([losses[-1] - losses[0] for losses in drawn]),
                "mean_success_relative": share(drawn, RELATIVE, relative=True),
                **{f"mean_success_{threshold:g}": share(drawn, threshold) for threshold in ABSOLUTE},
            }
        return found
