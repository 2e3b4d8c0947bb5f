"""Examples of a task as tokens of a model: what it reads, and what it is to write.

    plain       the task's own words, a space, the reply
    template    the conversation through the tokenizer's chat template, or the same words as a user's turn; the reply is the
                assistant's

Prompt and reply become tokens apart from each other, so that a prompt has the same tokens whether a reply stands behind it, is
ranked, or is yet to be written. Behind a reply stands the end token: it is taught like every other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from lesion.task import AnyTask, Example
from lesion.trial import Specimen

if TYPE_CHECKING:
    from lesion.decode import OneLine

Chat = Literal["plain", "template", "auto"]
TOLD = "auto: the chat template where there is one"


def templated(reader: Any, chat: Chat) -> bool:
    """Whether prompts go through the chat template of a tokenizer or processor. Raises ValueError where it is asked for and there
    is none."""
    there = bool(getattr(reader, "chat_template", None))
    if chat == "template" and not there:
        raise ValueError("chat='template' was asked for, but this tokenizer has no chat template")
    return there and chat != "plain"


def prompt(specimen: Specimen, task: AnyTask, example: Example, chat: Chat, before: str = "") -> list[int]:
    """The tokens of a question, behind the text of examples."""
    tokenizer = specimen.tokenizer
    assert tokenizer is not None
    if specimen.model.config.is_encoder_decoder:
        return list(tokenizer(before + task.seq2seq(example))["input_ids"])
    text = before + task.prompt(example)
    if not templated(tokenizer, chat):
        return list(tokenizer(text)["input_ids"])
    said = example.turns or (("user", task.prompt(example).strip()),)
    turns = [{"role": role, "content": words} for role, words in said]
    turns[-1]["content"] = before + turns[-1]["content"]
    made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(made, add_special_tokens=False)["input_ids"])


def reply(specimen: Specimen, task: AnyTask, text: str, chat: Chat) -> list[int]:
    """The tokens of a reply, without an end token."""
    tokenizer = specimen.tokenizer
    assert tokenizer is not None

    def tokens(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    if specimen.model.config.is_encoder_decoder or templated(tokenizer, chat):
        return tokens(text)
    # Behind something whose tokens are taken off again: many tokenizers put a space of their own before every text.
    before, text = ("x", f" {text}") if task.line else ("x\n", text)
    first, whole = tokens(before), tokens(before + text)
    return whole[len(first) :] if whole[: len(first)] == first else tokens(text)


def end(specimen: Specimen, chat: Chat) -> int:
    """The token that a reply ends with: what the chat template closes a turn with, else the tokenizer's end token."""
    tokenizer = specimen.tokenizer
    found: int | None = None
    if tokenizer is not None and not specimen.model.config.is_encoder_decoder and templated(tokenizer, chat):
        found = _closing(tokenizer)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        raise ValueError("this tokenizer has no end token, which a reply ends with")
    return int(found)


@lru_cache(maxsize=4)
def _closing(tokenizer: Any) -> int | None:
    """The special token that a chat template puts behind what the assistant said; None where it puts none."""
    said = "All right"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    _, _, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in special), None)


def end_tokens(specimen: Specimen, chat: Chat = "plain") -> frozenset[int]:
    """Ids that end a text: those of the model's generation settings, the tokenizer's end token, and what closes a turn."""
    tokenizer = specimen.tokenizer
    named: Any = getattr(specimen.model.generation_config, "eos_token_id", None)
    found = set(named) if isinstance(named, (list, tuple)) else {named}
    found |= {getattr(tokenizer, "eos_token_id", None)}
    if tokenizer is not None and templated(tokenizer, chat):
        found |= {_closing(tokenizer)}
    return frozenset(found - {None})


@lru_cache(maxsize=4)
def one_line(tokenizer: Any) -> OneLine:
    """What ends a reply of one line, beside the end tokens."""
    from lesion.decode import OneLine

    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    blank = frozenset(i for i, text in enumerate(texts) if text and not text.strip())
    return OneLine(frozenset(i for i, text in enumerate(texts) if "\n" in text), blank)


def pairs(
    specimen: Specimen, task: AnyTask, examples: Sequence[Example], chat: Chat
) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompts and of replies with their end token."""
    last = end(specimen, chat)
    return [(prompt(specimen, task, e, chat), [*reply(specimen, task, e.answer, chat), last]) for e in examples]
