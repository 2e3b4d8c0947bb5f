"""Batched sampling with a cache: many prompts through few slots.

A slot is one row of the batch. A row that stops frees its slot, and waiting prompts are started there while the others go
on; rows sit at their own positions, so nothing is shifted or copied. What all prompts of a call begin with (a chat
template's system message) is computed once.

The random numbers of an item come from a stream of its own, keyed by (seed, item, position). Who shares a batch with
whom, in which order and how many at a time, therefore reaches a text only through the rounding of sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from lesion import streams
from lesion.inference import SlotCache, inference, mask_by_kind
from lesion.likelihood import beginning, context_of
from lesion.sampling import Sampling, choose

logger = logging.getLogger("lesion")

PREFILL_TOKENS = 2048  # prompts are started in groups of about so many tokens, of similar length
PADDING = 8  # prompts of one group differ by at most so many tokens


@dataclass(frozen=True)
class Prompt:
    """One item to continue: its id names its random stream.

    A prompt with a picture has the `tensors` that show it to the model (one object for all prompts that show the same),
    and says which of its tokens stand for it: `shows` has the number of the picture for each token, 0 for text. `room`: new
    tokens at most, where that is fewer than of the others.
    """

    item: str
    tokens: tuple[int, ...]
    shows: tuple[int, ...] = ()
    tensors: Mapping[str, torch.Tensor] | None = None
    room: int | None = None

    def most(self, new_tokens: int) -> int:
        return new_tokens if self.room is None else min(self.room, new_tokens)


@dataclass
class Continuation:
    """What a prompt became. `tokens` has no prompt and no end token; `logprobs` are natural, one for each drawn token."""

    item: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: str = ""  # "end": the model ended; "length": the limit did; "not finite": the logits were NaN or infinite
    ended_by: int | None = None  # the token that ended it, where one did
    duration: float = 0.0  # seconds from the start of its slot to its last token


@dataclass(frozen=True)
class OneLine:
    """A text of one line: ids whose text has a line break, and those whose text is blank, with a break or without. A break ends
    the text once anything else has been written: many models begin their answer on a new line."""

    breaks: frozenset[int]
    blank: frozenset[int]


class Engine(Protocol):
    """A model's forward over slots. Logits are [rows, V], of each row's last token."""

    refills: bool

    def groups(self, fresh: dict[int, Prompt]) -> list[list[int]]: ...

    def start(self, slots: list[int], prompts: list[Prompt]) -> torch.Tensor: ...
    def step(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def keep(self, slots: list[int]) -> None: ...


def continue_texts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Sampling,
    *,
    new_tokens: int,
    ends: frozenset[int],
    seed: int,
    batch: int,
    line: OneLine | None = None,
) -> list[Continuation]:
    """Continues every prompt by at most `new_tokens`, in the order given. `ends`: ids that end a text (not part of it); `line`:
    so do line breaks.

    When memory runs out, everything is computed again with half the slots, and that is logged; with one slot it is an error.
    """
    _refuse_bad(model, prompts, new_tokens)
    slots = min(batch, len(prompts))
    while True:
        try:
            with inference(model):
                return _run(model, prompts, how, new_tokens, ends, line, seed, slots)
        except Exception as error:
            if not _is_out_of_memory(error) or slots == 1:
                raise
            slots = (slots + 1) // 2
            logger.warning("out of memory: going on with %d rows at a time (the floor is 1)", slots)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _run(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Sampling,
    new_tokens: int,
    ends: frozenset[int],
    line: OneLine | None,
    seed: int,
    slots: int,
) -> list[Continuation]:
    engine = _engine(model, slots, prompts, new_tokens)
    found = {p.item: Continuation(p.item) for p in prompts}
    most = {p.item: p.most(new_tokens) for p in prompts}
    noise = {p.item: streams.uniform01(seed, p.item, "sampling", new_tokens) for p in prompts}
    waiting, rows = list(reversed(prompts)), [None] * slots  # type: list[Prompt], list[Prompt | None]
    started = dict.fromkeys(found, 0.0)
    last = torch.zeros(slots, dtype=torch.long)
    breaks, blank = (line.breaks, line.blank) if line else (frozenset[int](), frozenset[int]())
    ending = torch.tensor(sorted(ends | breaks) or [-1])

    def draw(at: list[int], logits: torch.Tensor) -> None:
        """Draws the next token of the rows `at`, and frees those that stop."""
        items = [found[rows[slot].item] for slot in at]  # type: ignore[union-attr]
        uniform = torch.tensor([noise[c.item][len(c.logprobs)] for c in items], device=logits.device)
        token, logprob = (x.cpu() for x in choose(logits, uniform, how))
        last[at] = token
        ended, finite = torch.isin(token, ending).tolist(), logprob.isfinite().tolist()
        for slot, c, t, log, end, fine in zip(at, items, token.tolist(), logprob.tolist(), ended, finite, strict=True):
            if not fine:
                c.stop = "not finite"
            else:
                c.logprobs.append(log)
                if end and (t in ends or not blank.issuperset(c.tokens)):
                    c.stop, c.ended_by = "end", t
                else:
                    c.tokens.append(t)
                    c.stop = "length" if len(c.logprobs) == most[c.item] else ""
            if c.stop:
                c.duration = time.perf_counter() - started[c.item]
                rows[slot] = None

    while waiting or any(rows):
        free = [slot for slot, row in enumerate(rows) if row is None]
        if (waiting and len(free) == len(rows)) or (engine.refills and waiting and len(free) * 8 >= len(rows)):
            fresh = {slot: waiting.pop() for slot in free[: len(waiting)]}
            now = time.perf_counter()
            for slot, prompt in fresh.items():
                rows[slot], started[prompt.item] = prompt, now
            for group in engine.groups(fresh):
                draw(group, engine.start(group, [fresh[slot] for slot in group]))
            continue
        alive = [slot for slot, row in enumerate(rows) if row is not None]
        if len(alive) * 4 <= len(rows) * 3 and not waiting:  # nobody will come: a smaller batch is faster
            engine.keep(alive)
            rows, last, alive = [rows[slot] for slot in alive], last[alive], list(range(len(alive)))
        logits = engine.step(last)
        draw(alive, logits if len(alive) == len(rows) else logits[alive])
    return [found[p.item] for p in prompts]


class Slots:
    """Engine of causal models: every row at its own position, prompts padded on the left while they are read."""

    refills = True

    def __init__(self, model: PreTrainedModel, rows: int, prompts: Sequence[Prompt], new_tokens: int):
        self.model = model
        self.text = model.config.get_text_config()
        self.dtype = model.get_input_embeddings().weight.dtype
        longest = max(len(p.tokens) for p in prompts)
        self.shared = _common_prefix(prompts) if len(prompts) > 1 else 0
        self.cache = SlotCache(rows, longest)
        self.limit = max(len(p.tokens) + p.most(new_tokens) for p in prompts)
        self.positions = torch.zeros(rows, dtype=torch.long, device=model.device)  # of the token to come
        self.prefix: SlotCache | None = None
        if self.shared:
            self.prefix = SlotCache(1, self.shared)
            tokens = torch.tensor([prompts[0].tokens[: self.shared]], device=model.device)
            at = torch.arange(self.shared, device=model.device)[None]
            self._forward(self.prefix, torch.arange(1), tokens, at, *self._sight(prompts[:1], 0, self.shared))

    def groups(self, fresh: dict[int, Prompt]) -> list[list[int]]:
        """Slots whose prompts are started together: of similar length, since the shorter ones are padded. A prompt whose
        picture is not in the shared prefix is started alone, because pictures may differ in their tensors' shapes."""
        alone = [[slot] for slot, prompt in fresh.items() if any(prompt.shows[self.shared :])]
        order = sorted(
            (slot for slot in fresh if [slot] not in alone), key=lambda slot: (len(fresh[slot].tokens), slot)
        )
        groups: list[list[int]] = []
        for slot in order:
            n = len(fresh[slot].tokens)
            group = groups[-1] if groups else []
            if not group or n - len(fresh[group[0]].tokens) > PADDING or n * (len(group) + 1) > PREFILL_TOKENS:
                groups.append(group := [])
            group.append(slot)
        return groups + alone

    def _sight(
        self, prompts: Sequence[Prompt], start: int, end: int | None
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """What one prompt, from token `start` to `end`, shows: the picture of each token [1, T], and the model's input."""
        shows = prompts[0].shows[start:end]
        if not any(shows):
            return None, {}
        assert len(prompts) == 1 and prompts[0].tensors is not None
        device = self.model.device
        tensors = {
            name: value.to(device, self.dtype if value.is_floating_point() else None)
            for name, value in prompts[0].tensors.items()
        }
        return torch.tensor([shows], device=device), tensors

    def _forward(
        self,
        cache: SlotCache,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        at: torch.Tensor,
        shows: torch.Tensor | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """tokens, at, shows [n, T]; padding has `at` -1. Returns logits [n, V] of the last token."""
        padded = at < 0
        cache.turn_to(slots, at.masked_fill(padded, cache.columns - 1))
        seen_both_ways = shows if self.model.config.model_type in _SEES_BOTH_WAYS else None
        mask = mask_by_kind(self.text, lambda window: cache.mask(window, self.dtype, seen_both_ways))
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=at.clamp(min=0),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
            **(tensors or {}),
        )
        return out.logits[:, -1]

    def start(self, slots: list[int], prompts: list[Prompt]) -> torch.Tensor:
        rest = [p.tokens[self.shared :] for p in prompts]
        width = max(map(len, rest))
        # padding is a row's own first token: a token that is NaN to the model would reach the row through a weight of 0
        tokens = torch.tensor([[r[0]] * (width - len(r)) + list(r) for r in rest])
        at = torch.tensor([[-1] * (width - len(r)) + list(range(self.shared, self.shared + len(r))) for r in rest])
        index = torch.tensor(slots)
        self.cache.clear(index)
        if self.prefix is not None:
            self.cache.copy_prefix(self.prefix, index, self.shared)
        device = self.positions.device
        self.positions[index] = torch.tensor([len(p.tokens) for p in prompts], device=device)
        sight = self._sight(prompts, self.shared, None)
        return self._forward(self.cache, index, tokens.to(device), at.to(device), *sight)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.positions.clamp_(max=self.limit - 1)  # rows that have stopped stand still
        self.cache.reserve(int(self.positions.max()) + 1)
        device = self.positions.device
        logits = self._forward(
            self.cache, torch.arange(self.cache.rows), tokens[:, None].to(device), self.positions[:, None].clone()
        )
        self.positions += 1
        return logits

    def keep(self, slots: list[int]) -> None:
        self.cache.keep_rows(torch.tensor(slots))
        self.positions = self.positions[slots]


class Waves:
    """Engine of encoder-decoder models: rows start together, since a decoder's position is that of its batch."""

    refills = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.alive: torch.Tensor | None = None

    def groups(self, fresh: dict[int, Prompt]) -> list[list[int]]:
        return [list(fresh)]

    def start(self, slots: list[int], prompts: list[Prompt]) -> torch.Tensor:
        texts, device = [p.tokens for p in prompts], self.model.device
        width = max(map(len, texts))
        tokens = torch.tensor([[*p, *[p[-1]] * (width - len(p))] for p in texts], device=device)
        self.mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in texts], device=device)
        self.encoded = self.model.get_encoder()(input_ids=tokens, attention_mask=self.mask)
        self.cache: Any = None
        first = torch.full((len(prompts),), self.model.generation_config.decoder_start_token_id, device=device)
        self.slots = torch.tensor(slots)
        return self._forward(first)

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None].to(self.model.device),
            cache=self.cache,
            use_cache=True,
        )
        self.cache = out.cache
        return out.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        here = self._forward(tokens[self.slots])
        logits = here.new_zeros(len(tokens), here.shape[-1])
        logits[self.slots.to(here.device)] = here
        return logits

    def keep(self, slots: list[int]) -> None:
        index = torch.tensor([self.slots.tolist().index(slot) for slot in slots], device=self.model.device)
        self.mask = self.mask[index]
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[index]
        self.cache.reorder_cache(index)
        self.slots = torch.arange(len(slots))


_SEES_BOTH_WAYS = {"gemma3"}  # the tokens of one picture see each other, whatever their order


def _engine(model: PreTrainedModel, rows: int, prompts: Sequence[Prompt], new_tokens: int) -> Engine:
    if model.config.is_encoder_decoder:
        return Waves(model)
    return Slots(model, rows, prompts, new_tokens)


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Length of what all prompts begin with; each keeps at least one token of its own. A picture is shared whole or not
    at all, since its tokens look alike whatever it shows."""
    same = beginning([p.tokens for p in prompts])
    if any(any(p.shows) for p in prompts):
        begins = min((i for p in prompts for i, number in enumerate(p.shows) if number), default=same)
        ends = max(i + 1 for p in prompts for i, number in enumerate(p.shows) if number)
        if ends > same or any(p.tensors is not prompts[0].tensors for p in prompts):
            return min(same, begins)
    return same


def _refuse_bad(model: PreTrainedModel, prompts: Sequence[Prompt], new_tokens: int) -> None:
    if not prompts:
        raise ValueError("no prompts to continue")
    if new_tokens < 1:
        raise ValueError(f"at least one new token must be asked for, not {new_tokens}")
    text = model.config.get_text_config(decoder=False)
    context = context_of(text)
    for prompt in prompts:
        if (most := prompt.most(new_tokens)) < 1:
            raise ValueError(f"item {prompt.item!r} has no room for a new token")
        room = 0 if model.config.is_encoder_decoder else most
        if prompt.shows and model.config.is_encoder_decoder:
            raise ValueError(f"item {prompt.item!r} shows a picture, which an encoder-decoder model does not see")
        if not prompt.tokens:
            raise ValueError(f"the prompt of item {prompt.item!r} has no tokens")
        if context and len(prompt.tokens) + room > context:
            raise ValueError(
                f"the prompt of item {prompt.item!r} has {len(prompt.tokens)} tokens, which with {room} new ones "
                f"exceeds the context of {context}"
            )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


__all__ = ["Continuation", "Prompt", "Sampling", "continue_texts"]
