"""Order preservation: do representations follow the order of texts that rise in degree?

For a chain of texts x₁ < x₂ < … (`lesion.chains`) h(x) is the last hidden state of the last token, and the direction of rising
is learned from the chains of all other scales: u = Σ (h(x_last) − h(x_first)). A row has Kendall's τ (1938) between the order
of its texts and u·h(x), and two nulls:

    permuted   τ of the same numbers in each of the n! orders: its mean is 0, and p is the share with a τ as large
    random     mean τ along random directions, each turned so that the other scales rise along it

A model of monotone networks may preserve order better, or not at all: LayerNorm and attention are not monotone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lesion.chains import chains
from lesion.likelihood import padded
from lesion.stats import generator
from lesion.trial import Measure, Row, Specimen

Array = npt.NDArray[np.float64]


def tau(values: Array) -> Array:
    """Kendall's τ-a of values [..., n] with the order in which they stand: Σᵢ<ⱼ sign(vⱼ − vᵢ) / (n(n − 1)/2)."""
    n = values.shape[-1]
    i, j = np.triu_indices(n, 1)
    return np.asarray(np.sign(values[..., j] - values[..., i]).sum(-1) / (n * (n - 1) / 2))


class Order(Measure):
    """Kendall's τ of every chain along a direction that other scales have taught, beside two nulls."""

    chunk = 1024  # the direction of each chain comes from all others

    directions: int = Field(default=200, ge=1, description="random directions of the null")
    seed: int = Field(default=0, ge=0, description="of these directions")

    def items(self, specimen: Specimen) -> list[str]:
        return list(chains())

    def size(self) -> tuple[int, int]:
        return len(chains()), 15 * sum(map(len, chains().values()))

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        started = time.perf_counter()
        known = chains()
        states = self._states(specimen, [text for texts in known.values() for text in texts])
        if not np.isfinite(states).all():
            empty = dict.fromkeys(("tau", "random", "p"))
            return [{"item": item, "outcome": "not finite", **empty} for item in items]
        here: dict[str, Array] = {}
        for item, texts in known.items():
            here[item], states = states[: len(texts)], states[len(texts) :]
        rise = {item: h[-1] - h[0] for item, h in here.items()}
        drawn = generator("order", self.seed).standard_normal((self.directions, next(iter(rise.values())).size))
        rows: list[Row] = []
        for item in items:
            others = np.sum([rise[other] for other in rise if other.split("/")[0] != item.split("/")[0]], axis=0)
            turned = drawn * np.where(drawn @ others < 0, -1.0, 1.0)[:, None]
            along = here[item] @ others
            seen = float(tau(along))
            every = tau(along[np.array(list(itertools.permutations(range(len(along)))))])
            row = {"item": item, "outcome": "measured", "tau": seen, "p": float((every >= seen - 1e-12).mean())}
            rows.append({**row, "random": float(tau(turned @ here[item].T).mean())})
        return [{**row, "duration": (time.perf_counter() - started) / len(rows)} for row in rows]

    def _states(self, specimen: Specimen, texts: Sequence[str]) -> Array:
        """The last hidden state at the last token of each text [N, D]; of an encoder-decoder, the encoder's."""
        import torch

        from lesion.inference import inference

        assert specimen.tokenizer is not None
        tokens = [specimen.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        model = specimen.model
        stack: Any = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix)
        found = []
        with inference(model):
            for start in range(0, len(tokens), 32):
                some = tokens[start : start + 32]
                ids = padded(some).to(model.device)
                hidden = stack(input_ids=ids, use_cache=False).last_hidden_state
                last = torch.tensor([len(text) - 1 for text in some], device=hidden.device)
                found.append(hidden[torch.arange(len(some), device=hidden.device), last].double().cpu())
        states: Array = torch.cat(found).numpy()
        return states

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        good = [row for row in rows if row["outcome"] == "measured"]
        mean = {n: math.fsum(row[n] for row in good) / len(good) if good else None for n in ("tau", "random")}
        monotone = sum(row["tau"] == 1 for row in good) / len(good) if good else None
        return {**mean, "monotone": monotone, "chains": len(rows), "not_finite": len(rows) - len(good)}
