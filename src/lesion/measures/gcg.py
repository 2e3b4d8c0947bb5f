"""Greedy coordinate gradient: a string that makes the model say a given target (Zou et al. 2023, algorithm 1).

    loss = −(1/|target|) Σ ln p(target token | prompt, string, the target before it)        in nats

The search is that of `suffixes.py`; options are named as nanogcg names them, and mean the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lesion.stats import generator
from lesion.trial import Measure, Row, Specimen

if TYPE_CHECKING:
    import torch

    from lesion.suffixes import Draw, Frame

HERE = "{string}"
INITIAL = list(".,!?;:()[]{}@#$%&*wxyz")  # what the other strings of a buffer begin with


class Gcg(Measure):
    """A string sought for each pair of a prompt and a target, one row a pair: the curve of its loss, and where it ended."""

    chunk = 1

    pairs: tuple[tuple[str, str], ...] = Field(
        min_length=1, description="prompt and target; {string} in a prompt says where the string goes"
    )
    place: Literal["suffix", "prefix"] = Field(
        default="suffix", description="of the string, where a prompt does not say"
    )
    optim_str_init: str = Field(default="x x x x x x x x x x x x x x x x x x x x", description="first string")
    steps: int = Field(default=250, ge=1, description="of the search")
    search_width: int = Field(default=512, ge=1, description="strings drawn in a step")
    topk: int = Field(default=256, ge=1, description="candidates that the gradient names for a position")
    n_replace: int = Field(default=1, ge=1, description="tokens in which a drawn string differs")
    buffer: int = Field(default=0, ge=0, description="best strings that are kept; 0: always go on from the last one")
    filter_ids: bool = Field(default=True, description="only strings that survive being written out and read again")
    ascii: bool = Field(default=True, description="only tokens of printable ASCII")
    chat: Literal["auto", "template", "plain"] = Field(
        default="auto", description="auto: the chat template where there is one"
    )
    seed: int = Field(default=0, ge=0, description="of what is drawn")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError("a pair of prompt and target stands twice in `pairs`")
        for prompt, _ in self.pairs:
            if prompt.count(HERE) > 1:
                raise ValueError(f"{HERE} stands more than once in the prompt {prompt!r}")
        return self

    def _named(self) -> dict[str, tuple[str, str]]:
        return {f"{prompt} → {target}": (prompt, target) for prompt, target in self.pairs}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self._named())

    def size(self) -> tuple[int, int]:
        tokens = sum(len(p) + len(t) + len(self.optim_str_init) for p, t in self.pairs) // 4 + 30 * len(self.pairs)
        return len(self.pairs), tokens * self.steps * self.search_width

    def read(self, specimen: Specimen, items: Sequence[str]) -> Iterator[Row]:
        from lesion.flips import losses, stable, written
        from lesion.suffixes import search

        may = self.may(specimen)
        for item in items:
            began, (prompt, target) = time.perf_counter(), self._named()[item]
            frame = self.frame(specimen, item, prompt, target)
            found = search(
                specimen.model,
                frame,
                self._start(specimen, item),
                may,
                self._draw(item),
                tokenizer=specimen.tokenizer if self.filter_ids else None,
                **self.options(),
            )
            passage = frame.passage(found.string)
            [loss] = losses(specimen.model, [passage])
            fine = math.isfinite(loss) and math.isfinite(found.start)
            assert specimen.tokenizer is not None
            yield {
                "item": item,
                "prompt": prompt,
                "target": target,
                "outcome": found.outcome if fine else "not finite",
                "string": written(specimen.tokenizer, found.string),
                "string_ids": found.string,
                "start": found.start if math.isfinite(found.start) else None,
                "loss": loss if fine else None,  # computed again, by the plain forward
                "losses": found.losses,
                "scored": found.scored,
                "stable": stable(specimen.tokenizer, found.string),
                "stable_in_prompt": stable(specimen.tokenizer, passage.attacked),
                "duration": time.perf_counter() - began,
            }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        good = [row for row in rows if row["loss"] is not None]
        return {
            "loss": math.fsum(row["loss"] for row in good) / len(good) if good else None,
            "start": math.fsum(row["start"] for row in good) / len(good) if good else None,
            "stable": sum(row["stable"] for row in good) / len(good) if good else None,
            "not_finite": sum(row["outcome"] == "not finite" for row in rows),
        }

    def may(self, specimen: Specimen) -> torch.Tensor:
        """Which ids the string may have: bool [V]."""
        import torch

        from lesion.flips import allowed, table

        assert specimen.tokenizer is not None
        may = allowed(specimen.tokenizer, len(table(specimen.model)))
        if self.ascii:
            texts = specimen.tokenizer.batch_decode([[i] for i in range(len(may))])
            may = may & torch.tensor([text.isascii() and text.isprintable() for text in texts])
        return may

    def options(self) -> dict[str, int]:
        """What the search is told."""
        return {name: getattr(self, name) for name in ("steps", "search_width", "topk", "n_replace", "buffer")}

    def frame(self, specimen: Specimen, item: str, prompt: str, target: str) -> Frame:
        """A prompt and a target as tokens. Raises ValueError for a target without any."""
        from lesion.suffixes import Frame

        tokenizer, encoder = specimen.tokenizer, specimen.model.config.is_encoder_decoder
        assert tokenizer is not None
        if HERE not in prompt:
            prompt = prompt + HERE if self.place == "suffix" else HERE + prompt
        chats = bool(tokenizer.chat_template) and self.chat != "plain"
        if self.chat == "template" and not chats:
            raise ValueError("chat='template' was asked for, but this tokenizer has no chat template")
        if chats:
            talk = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        before, after = prompt.split(HERE)
        # a chat template brings its own start tokens, and an encoder's text ends with its end token, which comes last
        frame = Frame(
            item,
            tokenizer(before, add_special_tokens=not (encoder or chats))["input_ids"],
            tokenizer(after, add_special_tokens=encoder and not chats)["input_ids"],
            tokenizer(target, add_special_tokens=False)["input_ids"],
            encoder,
        )
        if not frame.target:
            raise ValueError(f"the target {target!r} has no tokens, so there is nothing to make the model say")
        return frame

    def _start(self, specimen: Specimen, item: str) -> torch.Tensor:
        """The first strings [buffer, P]: `optim_str_init`, and behind it random ones of simple characters."""
        import torch

        assert specimen.tokenizer is not None
        first = specimen.tokenizer(self.optim_str_init, add_special_tokens=False)["input_ids"]
        if len(first) < self.n_replace:
            raise ValueError(f"optim_str_init has {len(first)} tokens, of which {self.n_replace} were to be replaced")
        marks = specimen.tokenizer(INITIAL, add_special_tokens=False)["input_ids"]
        simple = torch.tensor([ids[0] for ids in marks if len(ids) == 1])
        drawn = generator("gcg start", self.seed, item).integers(
            len(simple), size=(max(self.buffer, 1) - 1, len(first))
        )
        return torch.cat((torch.tensor([first]), simple[torch.from_numpy(drawn)]))

    def _draw(self, item: str) -> Draw:
        def draw(step: int, n: int, positions: int, choices: int) -> tuple[Any, Any]:
            stream = generator("gcg", self.seed, item, step)
            return stream.random((n, positions)), stream.integers(choices, size=(n, positions))

        return draw
