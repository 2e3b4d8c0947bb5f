"""Generation: what the model answers to a battery of prompts, one row for each prompt and repeat.

Sampling draws from a stream of its own for each item (see `decode.py`), so a damaged and an undamaged model that are
asked with the same seed differ by the damage and not by luck.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field

from lesion import asking
from lesion.batteries import Prompt, battery, battery_digest, grade, picture_digest
from lesion.trial import Measure, Row, Specimen


class Generation(Measure):
    """Continuations of a prompt battery: text without the prompt, tokens, stop reason, mean log-probability, duration."""

    battery: str = Field(default="small", description="packaged battery, or a .jsonl or .csv file")
    repeats: int = Field(default=1, ge=1, description="continuations of each prompt")
    seed: int = Field(default=0, ge=0, description="of the sampling noise")
    new_tokens: int = Field(default=48, ge=1, description="at most so many tokens are generated")
    temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_k: int = Field(default=64, ge=0, description="0: all tokens")
    top_p: float = Field(default=0.95, gt=0, le=1, description="1: all tokens")
    prompts: int = Field(default=0, ge=0, description="first so many prompts of the battery; 0: all")
    batch: int = Field(default=40, ge=1, description="rows at a time")
    chat: Literal["auto", "template", "plain"] = Field(
        default="auto", description="auto: the chat template where there is one"
    )
    sha256: str | None = Field(default=None, description="digest of the battery; filled in when the reading is pinned")

    def pin(self) -> Self:
        found = battery_digest(self.battery)
        if shown := sorted({p.image for p in battery(self.battery) if p.image is not None}):
            text = " ".join([found, *map(picture_digest, shown)])
            found = hashlib.sha256(text.encode()).hexdigest()
        return self.with_digest(f"battery {self.battery!r}", found)

    def questions(self) -> dict[str, Prompt]:
        """The prompts by item."""
        chosen = battery(self.battery)[: self.prompts or None]
        return {f"{p.id}#{repeat}": p for repeat in range(self.repeats) for p in chosen}

    def items(self, specimen: Specimen) -> list[str]:
        return list(self.questions())

    def chunks(self, items: Sequence[str]) -> Iterator[list[str]]:
        """Four batches at a time: long enough for freed slots to be refilled, short enough to lose little in a crash."""
        for start in range(0, len(items), 4 * self.batch):
            yield list(items[start : start + 4 * self.batch])

    def size(self) -> tuple[int, int]:
        prompts = self.questions().values()
        return len(prompts), sum(len(p.text) // 4 + 30 + self.new_tokens for p in prompts)

    def read(self, specimen: Specimen, items: Sequence[str]) -> list[Row]:
        prompts = self.questions()
        return self.answers(specimen, prompts, self._asked(specimen, {item: prompts[item] for item in items}))

    def answers(self, specimen: Specimen, prompts: Mapping[str, Prompt], asked: Sequence[Any]) -> list[Row]:
        """One row for each `decode.Prompt` of `asked`: what the model writes after those tokens, graded as the prompt of
        that item says."""
        from lesion import decode

        how = decode.Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        found = decode.continue_texts(
            specimen.model,
            asked,
            how,
            new_tokens=self.new_tokens,
            ends=asking.end_tokens(specimen),
            seed=self.seed,
            batch=self.batch,
        )
        return [self._row(specimen, prompts[c.item], c) for c in found]

    def _asked(self, specimen: Specimen, prompts: dict[str, Prompt]) -> list[Any]:
        """The prompts as tokens, and pictures as what the model's processor makes of them."""
        from lesion import decode
        from lesion.pictures import look

        asked: list[Any] = []
        tensors: dict[str, Any] = {}  # of each picture: one object, however many prompts show it
        for item, prompt in prompts.items():
            if prompt.image is None:
                asked.append(decode.Prompt(item, self.tokenise(specimen, prompt.text)))
                continue
            if specimen.processor is None:
                name = type(specimen.model).__name__
                raise ValueError(
                    f"prompt {prompt.id!r} shows a picture, but this {name} comes without an image processor"
                )
            ids, shows, made = look(
                specimen.processor, prompt.text, prompt.image, asking.templated(specimen.processor, self.chat)
            )
            asked.append(decode.Prompt(item, ids, shows, tensors.setdefault(prompt.image, made)))
        return asked

    def tokenise(self, specimen: Specimen, prompt: str) -> tuple[int, ...]:
        """What the model reads before it answers. A chat template brings its own start tokens; without one the
        tokenizer's own rules hold."""
        text, own = self.rendered(specimen, prompt)
        assert specimen.tokenizer is not None
        return tuple(specimen.tokenizer(text, add_special_tokens=own)["input_ids"])

    def rendered(self, specimen: Specimen, prompt: str) -> tuple[str, bool]:
        """The same as text, and whether the tokenizer's own start tokens go with it."""
        tokenizer = specimen.tokenizer
        assert tokenizer is not None
        if not asking.templated(tokenizer, self.chat):
            return prompt, True
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return text, False

    def _row(self, specimen: Specimen, prompt: Prompt, found: Any) -> Row:
        assert specimen.tokenizer is not None
        text = specimen.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
        return {
            "item": found.item,
            "prompt": prompt.id,
            "group": prompt.group,
            "asked": prompt.text,
            "image": prompt.image,
            "text": text,
            "tokens": len(found.tokens),
            "stop": found.stop,
            "logprob": math.fsum(found.logprobs) / len(found.logprobs) if found.logprobs else None,
            "correct": grade(prompt, text),
            "duration": found.duration,
        }

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        keyed = [row["correct"] for row in rows if row["correct"] is not None]
        logprobs = [row["logprob"] for row in rows if row["logprob"] is not None]
        return {
            "accuracy": sum(keyed) / len(keyed) if keyed else None,
            "graded": len(keyed),
            "tokens": sum(row["tokens"] for row in rows),
            "logprob": math.fsum(logprobs) / len(logprobs) if logprobs else None,
            "ended": sum(row["stop"] == "end" for row in rows) / len(rows),
            "not_finite": sum(row["stop"] == "not finite" for row in rows),
        }
