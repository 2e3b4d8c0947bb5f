"""Tokenizers of one's own: byte-level BPE trained on a corpus (Sennrich et al. 2016; bytes as in Radford et al. 2019).

Ids are laid out as `packaged.byte_tokenizer` lays them out: bytes are 0 to 255, the special tokens 256 to 259, and merges
follow in the order in which they were learned. So a model made for bytes keeps its start, end and padding ids, and every
text can be written, whatever the corpus held. The same documents give the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lesion.packaged import SPECIAL, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAMES = ("<bos>", "<eos>", "<pad>", "<unk>")


def train(texts: Iterable[str], size: int, begin: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` ids. Each text it reads begins with `begin` start tokens, as a model with learned sinks wants.

    Raises ValueError where the size has no room for bytes and special tokens, or the texts have too few pairs to fill it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if size < VOCABULARY:
        raise ValueError(f"a vocabulary of {size} is too small: bytes and 4 special tokens are {VOCABULARY}")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(NAMES), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    if len(merges) + VOCABULARY < size:
        raise ValueError(
            f"this text has only {len(merges)} pairs that occur twice, so a vocabulary of at most "
            f"{len(merges) + VOCABULARY}, not {size}"
        )
    vocabulary = {letter: id for id, letter in enumerate(alphabet)}
    vocabulary |= {name: len(alphabet) + i for i, name in enumerate(NAMES)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    return _made(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), begin)


def _made(tokenizer: object, begin: int) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner: Any = tokenizer
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in NAMES])
    if begin:
        start = [NAMES[0]] * begin
        inner.post_processor = processors.TemplateProcessing(
            single=[*start, "$A"], special_tokens=[(NAMES[0], SPECIAL["bos_token_id"])]
        )
    words = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), NAMES, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **words)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what a fast tokenizer does, as JSON."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise ValueError(f"a {type(tokenizer).__name__} has no JSON form; expected a fast tokenizer")
    return hashlib.sha256(inner.to_str().encode()).hexdigest()
