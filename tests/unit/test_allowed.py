"""What may be put into a text: no special, added, unused, unknown or padding id, and none that text cannot carry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attacks import model, passage
from lesion.flips import _asked as asked
from lesion.flips import allowed, attackable, candidates, gradients, stable, table
from lesion.packaged import SPECIAL, byte_tokenizer
from lesion.triggers import drawn

WORDS = ["a", "b", "ab", "Ġa", "Ġb", "Ġab", "Ċ", "Ã", "<unused7>", "[unused3]", "c"]
MERGES = [("Ġ", "a"), ("Ġ", "b"), ("Ġa", "b"), ("a", "b")]


def merging_tokenizer():
    """A byte-level BPE that joins a and b, with two unused words, a special token and an added one."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "Ġ"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    made.add_tokens([AddedToken("zz")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def test_only_what_text_can_carry_is_allowed():
    tokenizer = merging_tokenizer()
    may = allowed(tokenizer, 20)
    assert may.shape == (20,) and may.dtype == torch.bool
    names = {tokenizer.convert_ids_to_tokens(i) for i in may.nonzero()[:, 0].tolist()}
    # Ã is half a letter; <eos>, zz and the rows behind the tokenizer's last id are no tokens of a text
    assert names == {"a", "b", "ab", "Ġa", "Ġb", "Ġab", "Ċ", "c", "Ġ"}
    assert allowed(tokenizer, 3).tolist() == [True, True, True]


def test_unused_words_are_not_allowed_even_where_text_can_carry_them():
    class Words:
        all_special_ids, added_tokens_decoder = [0], {}
        names = ("<s>", "word", "<unused12>", "[unused3]", "<|reserved_special_token_4|>", "unused", "<b>")

        def __len__(self):
            return len(self.names)

        def batch_decode(self, several, **how):
            return [self.names[ids[0]] for ids in several]

        def __call__(self, texts, **how):
            return {"input_ids": [[self.names.index(text)] for text in texts]}

    assert asked(Words(), 9).tolist() == [False, True, False, False, False, True, True, False, False]


def test_who_forbids_more_forbids_it_for_nobody_else():
    tokenizer = byte_tokenizer()
    before = allowed(tokenizer, 264).clone()
    allowed(tokenizer, 264).fill_(False)
    assert torch.equal(allowed(tokenizer, 264), before) and before.any()


def test_bytes_that_are_no_letter_alone_are_not_allowed():
    tokenizer = byte_tokenizer()
    may = allowed(tokenizer, 264)
    assert {tokenizer.decode([i]) for i in may.nonzero()[:, 0].tolist()} == {chr(i) for i in range(128)}
    assert not may[list(SPECIAL.values())].any()


def test_tokens_that_merge_in_text_are_not_stable():
    tokenizer = merging_tokenizer()
    a, b, ab = (tokenizer.convert_tokens_to_ids(word) for word in ("a", "b", "ab"))
    assert stable(tokenizer, [ab, b, a]) and not stable(tokenizer, [a, b])
    assert stable(tokenizer, [])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), length=st.integers(1, 12))
def test_random_triggers_are_allowed_stable_and_known_by_their_seed(seed, length):
    tokenizer = merging_tokenizer()
    may = allowed(tokenizer, 20)
    found = drawn("test", seed, 0, length, may, tokenizer)
    assert len(found) == length and may[found].all() and stable(tokenizer, found)
    assert found == drawn("test", seed, 0, length, may, tokenizer)
    assert drawn("test", seed, 1, 12, may) != drawn("test", seed, 0, 12, may)


def test_no_random_trigger_where_none_survives():
    tokenizer = merging_tokenizer()
    may = torch.zeros(20, dtype=torch.bool)
    may[WORDS.index("Ã")] = True
    with pytest.raises(ValueError, match="no random trigger of 2 tokens survives"):
        drawn("test", 0, 0, 2, may, tokenizer)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 20), ascend=st.booleans())
def test_no_forbidden_id_is_ever_a_candidate(seed, k, ascend):
    mine, text = model("tiny-llama", "float32"), passage("tiny-llama", 12, 8, seed)
    may = allowed(byte_tokenizer(), len(table(mine)))
    named = candidates(gradients(mine, text), table(mine), text.attacked, may, k, ascend=ascend)
    assert named.shape == (8, k) and may[named].all()
    assert all(token not in row for token, row in zip(text.attacked, named.tolist(), strict=True))
    assert attackable(text, may) == [i for i, token in enumerate(text.attacked) if may[token]]
