"""How likely given continuations of given contexts are, those of one context read together (Gao et al. 2021, the LM
evaluation harness, defines the two numbers; the tree is that of Miao et al. 2023, "SpecInfer", section 4).

    log p(c | x) = Σⱼ ln p(cⱼ | x, c₁ … cⱼ₋₁)  in nats        greedy: every cⱼ is the likeliest token at its place

The answers of a question share its text. It is read once, with all its answers behind it as branches of a tree: a token sees
the context and the tokens before it in its own branch, and its position is the one it has there.

    context  x₁ x₂ x₃ | a₁ a₂ | b₁ b₂ b₃       (the last token of a branch predicts nothing, so it is left out)
    position  0  1  2 |  3  4 |  3  4  5

What all contexts begin with, such as the examples of a few-shot prompt, is read once, and its keys and values are shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lesion.likelihood import BATCH_TOKENS, beginning, padded

if TYPE_CHECKING:
    import torch

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation, both not empty
Score = tuple[float, bool]  # log p(continuation | context) in nats, and whether it is what greedy decoding would write

SHARED = 16  # tokens that all contexts begin with, from which on they are read once

# Families whose attention is told by the mask, and whose positions by `position_ids`; the others read each pair alone.
BRANCHING = {
    "llama",
    "mistral",
    "qwen2",
    "gpt2",
    "gpt_neox",
    "opt",
    "gemma3",
    "gemma3_text",
    "smolvlm",
    "lesion-decoder",
}


@dataclass
class Tree:
    """A context and the continuations that follow it, with their places in the list that was asked for."""

    context: tuple[int, ...]
    branches: list[tuple[int, ...]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)

    def tokens(self) -> list[int]:
        """What the model reads."""
        return [*self.context, *(token for branch in self.branches for token in branch[:-1])]

    def positions(self) -> list[int]:
        n = len(self.context)
        return [*range(n), *(n + j for branch in self.branches for j in range(len(branch) - 1))]

    def owners(self) -> list[int]:
        """Which branch a token is of; the context is of branch 0."""
        return [0] * len(self.context) + [b for b, x in enumerate(self.branches, 1) for _ in range(len(x) - 1)]

    def predicting(self) -> list[int]:
        """The places whose predictions the tokens of the branches are, one branch after another."""
        found, start = [], len(self.context)
        for branch in self.branches:
            found += [len(self.context) - 1, *range(start, start + len(branch) - 1)]
            start += len(branch) - 1
        return found


def score(model: Any, pairs: Sequence[Pair]) -> list[Score]:
    """Log-likelihood (nats) and greedy match of every continuation, in the order given: float32 log-softmax, float64 sums.

    A log-likelihood that is not finite is returned as it is. Raises ValueError for an encoder-decoder model and for a
    context or a continuation without tokens.
    """
    from lesion.inference import inference
    from lesion.scoring import read_prefix

    if model.config.is_encoder_decoder:
        raise ValueError("continuations are scored with causal models, and this one is encoder-decoder")
    if empty := [i for i, pair in enumerate(pairs) if not (pair[0] and pair[1])]:
        raise ValueError(f"number {empty[0]}: expected tokens in context and continuation, got {pairs[empty[0]]!r}")
    found: dict[int, Score] = {}
    with inference(model):
        trees = grown(pairs, branching=branches_in(model))
        shared = common(trees) if branches_in(model) else 0
        prefix = None
        if shared:
            import torch

            prefix = read_prefix(model, torch.tensor(trees[0].context[:shared]))
            prefix.length = shared
            trees = [Tree(tree.context[shared:], tree.branches, tree.places) for tree in trees]
        for batch in batches(trees):
            found.update(read(model, batch, prefix))
        # what a mask hides has the weight 0, and 0 · NaN is NaN: beside a sick branch the others are read again, alone
        sick = [i for i, (logprob, _) in found.items() if not math.isfinite(logprob)]
        for batch in batches(grown(pairs, branching=False, of=sick)):
            found.update(read(model, batch))
    return [found[i] for i in range(len(pairs))]


def common(trees: Sequence[Tree]) -> int:
    """Tokens that all contexts begin with and that are worth sharing; each context keeps one of its own at least."""
    if len(trees) < 2:
        return 0
    same = beginning([tree.context for tree in trees])
    return same if same >= SHARED else 0


def branches_in(model: Any) -> bool:
    """Whether this model can read a tree: its family says so, and it keeps no sinks apart from the text."""
    text = model.config.get_text_config()
    return model.config.model_type in BRANCHING and getattr(text, "sinks", "none") == "none"


def grown(pairs: Sequence[Pair], *, branching: bool, of: Sequence[int] | None = None) -> list[Tree]:
    """Trees of the pairs `of` (None: all), those of one context together if `branching`, up to BATCH_TOKENS each."""
    trees: list[Tree] = []
    open_: dict[tuple[int, ...], Tree] = {}
    for place in range(len(pairs)) if of is None else of:
        context, branch = tuple(pairs[place][0]), tuple(pairs[place][1])
        tree = open_.get(context) if branching else None
        if tree is None or len(tree) + len(branch) > BATCH_TOKENS:
            tree = open_[context] = Tree(context)
            trees.append(tree)
        tree.branches.append(branch)
        tree.places.append(place)
    return trees


def batches(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Trees of similar length together, up to BATCH_TOKENS with the padding counted; plain texts apart, as they need no mask."""
    for several in (False, True):
        batch: list[Tree] = []
        for tree in sorted((t for t in trees if (len(t.branches) > 1) == several), key=lambda t: -len(t)):  # stable
            if batch and len(batch[0]) * (len(batch) + 1) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(tree)
        if batch:
            yield batch


def read(model: Any, batch: Sequence[Tree], prefix: Any = None) -> Iterator[tuple[int, Score]]:
    """One forward: for each pair its place and its score. Contexts go on from a prefix, where there is one."""
    import torch

    ids = padded([tree.tokens() for tree in batch]).to(model.device)
    width = ids.shape[1]
    unread = min(len(tree.context) for tree in batch) - 1  # leading predictions that nobody asks for
    start = 0 if prefix is None else prefix.length
    how = layout(model, batch, width, start) if any(len(tree.branches) > 1 for tree in batch) else {}
    if prefix is None:
        how["use_cache"] = False
    else:
        how.setdefault("position_ids", torch.arange(start, start + width, device=ids.device).expand(len(ids), -1))
        how |= {"cache": prefix, "use_cache": True}
    logits: torch.Tensor = model(input_ids=ids, logits_to_keep=width - unread, **how).logits
    rows = [row for row, tree in enumerate(batch) for branch in tree.branches for _ in branch]
    columns = [at - unread for tree in batch for at in tree.predicting()]
    target = torch.tensor([t for tree in batch for branch in tree.branches for t in branch], device=logits.device)
    logprobs_NV = logits[rows, columns].float().log_softmax(-1)
    chosen = logprobs_NV.gather(1, target[:, None])[:, 0].double().tolist()
    right = (logprobs_NV.argmax(-1) == target).tolist()
    start = 0  # of a branch's targets
    for tree in batch:
        for place, branch in zip(tree.places, tree.branches, strict=True):
            part = slice(start, start := start + len(branch))
            yield (
                place,
                (math.fsum(chosen[part]) if all(map(math.isfinite, chosen[part])) else math.nan, all(right[part])),
            )


def layout(model: Any, batch: Sequence[Tree], width: int, before: int = 0) -> dict[str, Any]:
    """Positions [B, T] and attention masks [B, 1, T, before + T] of trees, padded to a width, behind `before` tokens that all
    see. Padding sees itself, so that it stays finite."""
    import torch

    from lesion.inference import additive, mask_by_kind

    def tensor(lists: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*x, *[fill] * (width - len(x))] for x in lists], device=model.device)

    at_BT = before + tensor([tree.positions() for tree in batch], 0)
    owner_BT = tensor([tree.owners() for tree in batch], -1)
    place_T = torch.arange(width, device=model.device)
    seen_BTS = (owner_BT[:, None, :] == owner_BT[:, :, None]) | (owner_BT[:, None, :] == 0)
    seen_BTS &= place_T[None, :] <= place_T[:, None]
    seen_BTS[:, place_T, place_T] = True
    dtype = model.get_input_embeddings().weight.dtype
    keys_BS = torch.cat((torch.arange(before, device=model.device).expand(len(batch), -1), at_BT), 1)
    seen_BTS = torch.cat((seen_BTS.new_ones(len(batch), width, before), seen_BTS), 2)

    def make(window: int | None) -> torch.Tensor:
        near = seen_BTS if window is None else seen_BTS & (keys_BS[:, None, :] > at_BT[:, :, None] - window)
        return additive(near[:, None], dtype)

    return {"position_ids": at_BT, "attention_mask": mask_by_kind(model.config.get_text_config(), make)}
