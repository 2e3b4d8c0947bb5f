"""Gradients against finite differences, scores against one plain forward a text, for every family."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from attacks import FAMILIES, model, naive, passage
from lesion import passages, scoring
from lesion.flips import attackable, candidates, embedding, gradients, gradients_of, losses, score, table
from lesion.inference import inference
from lesion.passages import Passage

FREE = 200  # an id that no passage here has


def head_of_its_own(family, **config):
    """A copy whose head does not move with its embedding table, since only what is read is attacked."""
    found = copy.deepcopy(model(family, **config))
    head = found.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return found


@pytest.fixture
def exact(monkeypatch):
    """Norms and softmaxes that a model computes in float32, whatever its weights are, are computed in float64 too: the rounding
    would be larger than what is compared."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_finite_differences(family, exact):
    """A row is moved a little in the table, at an id of its own: whatever a model does to its embeddings is in the difference."""
    mine, text = head_of_its_own(family), passage(family)
    found = gradients(mine, text)
    assert found.shape == (len(text.attacked), table(mine).shape[1]) and found.dtype == torch.float64
    rows, stream, h = embedding(mine).weight.data, torch.Generator().manual_seed(1), 1e-4
    for position in (0, 1, 7, len(text.attacked) - 1):
        direction = torch.randn(rows.shape[1], generator=stream, dtype=rows.dtype) * rows.std()
        attacked = [*text.attacked[:position], FREE, *text.attacked[position + 1 :]]
        sides = []
        for sign in (1, -1):
            rows[FREE] = rows[text.attacked[position]] + sign * h * direction
            sides.append(naive(mine, text.changed(attacked)))
        difference = (sides[0] - sides[1]) / (2 * h)
        assert float(found[position] @ direction) == pytest.approx(difference, rel=1e-5, abs=1e-10), position


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3-text", "tiny-gpt2"])
def test_a_tied_head_does_not_enter_the_gradient(family, tied, exact):
    config = {"tie_word_embeddings": tied}
    plain, text = model(family, **config), passage(family)
    assert (plain.get_output_embeddings().weight is embedding(plain).weight) == tied
    torch.testing.assert_close(gradients(plain, text), gradients(head_of_its_own(family, **config), text))


def test_gradients_leave_a_model_as_it_was_also_inside_inference():
    mine, text = copy.deepcopy(model("tiny-llama", "float32")), passage("tiny-llama")
    before = {name: p.detach().clone() for name, p in mine.named_parameters()}
    alone = gradients(mine, text)
    with inference(mine):
        first = score(mine, text, torch.tensor([text.attacked]))
        arranged = [m for m in mine.modules() if "forward" in m.__dict__]
        torch.testing.assert_close(gradients(mine, text), alone)
        assert arranged == [m for m in mine.modules() if "forward" in m.__dict__], "what was packed is still used"
        assert torch.equal(score(mine, text, torch.tensor([text.attacked])), first)
    for name, p in mine.named_parameters():
        assert p.grad is None and p.requires_grad and torch.equal(p, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in mine.modules())


def test_gradients_leave_nothing_behind_when_they_fail(monkeypatch):
    mine, text = copy.deepcopy(model("tiny-llama", "float32")), passage("tiny-llama")
    with inference(mine):
        packed = mine.lm_head.forward
        monkeypatch.setattr(type(mine.lm_head), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradients(mine, text)
        assert mine.lm_head.forward == packed
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in mine.modules())


def test_a_model_of_nan_has_gradients_of_nan():
    mine = copy.deepcopy(model("tiny-llama"))
    mine.get_output_embeddings().weight.data[5] = math.nan
    assert not gradients(mine, passage("tiny-llama")).isfinite().any()


class Softplus(nn.Module):
    def forward(self, x):
        return nn.functional.softplus(x)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3-text", "tiny-t5"])
def test_a_parametrized_model_is_the_model_of_its_effective_weights(family):
    bent, text = head_of_its_own(family), passage(family)
    straight = copy.deepcopy(bent)
    for one, other in list(zip(bent.modules(), straight.modules(), strict=True)):
        if isinstance(one, nn.Linear) or one is embedding(bent):
            other.weight = nn.Parameter(nn.functional.softplus(one.weight.detach()))
            parametrize.register_parametrization(one, "weight", Softplus())
    torch.testing.assert_close(gradients(bent, text), gradients(straight, text))
    assert torch.equal(table(bent), table(straight))
    variants = torch.tensor([text.attacked]).repeat(3, 1)
    variants[1, 3], variants[2, 20] = 5, 6
    expected = torch.tensor([naive(straight, text.changed(v)) for v in variants.tolist()], dtype=torch.float64)
    torch.testing.assert_close(score(bent, text, variants), expected, rtol=1e-6, atol=1e-6)


def test_an_embedding_that_does_more_than_look_up_is_refused():
    mine = copy.deepcopy(model("tiny-llama"))
    hook = mine.get_input_embeddings().register_forward_hook(lambda m, given, out: out.roll(1, -1))
    with pytest.raises(ValueError, match="Embedding does more than look up rows and scale them"):
        gradients(mine, passage("tiny-llama"))
    hook.remove()
    assert not mine.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_all_lengths_share_a_batch_without_meeting(family, exact):
    mine = model(family)
    several = [
        passage(family, length, target, seed) for seed, (length, target) in enumerate([(40, 30), (9, 2), (25, 1)])
    ]
    together, alone = gradients_of(mine, several), [gradients(mine, text) for text in several]
    for a, b, text in zip(together, alone, several, strict=True):
        assert a.shape == (len(text.attacked), table(mine).shape[1])
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_one_plain_forward_a_text(family, monkeypatch):
    mine = model(family)
    several = [
        passage(family, length, target, seed) for seed, (length, target) in enumerate([(40, 30), (9, 2), (25, 1)])
    ]
    expected = [naive(mine, text) for text in several]
    assert losses(mine, several) == pytest.approx(expected, abs=2e-6)  # a likelihood is float32
    monkeypatch.setattr(passages, "BATCH_TOKENS", 1)
    assert losses(mine, several) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_plain_forward_a_text(family, monkeypatch):
    """With the batches that a small memory makes, and with a long prefix, beyond the windows of those that have one."""
    mine, text = model(family), passage(family, 60, 50)
    stream = torch.Generator().manual_seed(2)
    variants = torch.tensor([text.attacked]).repeat(12, 1)
    for row in variants[2:]:  # the first two are the text itself
        for _ in range(int(torch.randint(1, 4, (1,), generator=stream))):
            row[torch.randint(0, 50, (1,), generator=stream)] = torch.randint(0, 128, (1,), generator=stream)
    variants[5] = variants[4]
    variants[6, 1:], variants[7, 49] = variants[7, 1:], 9
    variants[8, 48] = 11
    expected = torch.tensor([naive(mine, text.changed(v)) for v in variants.tolist()], dtype=torch.float64)
    for small in ({}, {"BATCH_TOKENS": 70}, {"LOGITS": 1}, {"BATCH_TOKENS": 1}):
        with monkeypatch.context() as patch:
            for name, value in small.items():
                patch.setattr(scoring, name, value)
            torch.testing.assert_close(score(mine, text, variants), expected, rtol=1e-9, atol=1e-9)
    late = torch.tensor([text.attacked]).repeat(3, 1)
    late[0, 47], late[1, 48] = 3, 4
    expected = torch.tensor([naive(mine, text.changed(v)) for v in late.tolist()], dtype=torch.float64)
    torch.testing.assert_close(score(mine, text, late), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scores_of_any_variants_are_right_and_in_order(data):
    family = data.draw(st.sampled_from(["tiny-llama", "tiny-gemma3-text", "tiny-decoder", "tiny-opt"]))
    length = data.draw(st.integers(2, 20))
    text = passage(family, length, data.draw(st.integers(1, length - 1)), data.draw(st.integers(0, 3)))
    row = st.lists(st.integers(0, 127), min_size=text.target, max_size=text.target)
    variants = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=6)))
    mine = model(family)
    expected = torch.tensor([naive(mine, text.changed(v)) for v in variants.tolist()], dtype=torch.float64)
    torch.testing.assert_close(score(mine, text, variants), expected, rtol=1e-9, atol=1e-9)
    back = variants.flip(0)
    torch.testing.assert_close(score(mine, text, back), expected.flip(0), rtol=1e-9, atol=1e-9)


def test_what_stands_before_the_first_change_is_read_once():
    mine, text = copy.deepcopy(model("tiny-llama")), passage("tiny-llama", 60, 50)
    read = []
    mine.get_input_embeddings().register_forward_pre_hook(lambda m, given: read.append(given[0].numel()))
    variants = torch.tensor([text.attacked]).repeat(8, 1)
    variants[:, 40] = torch.arange(8)
    score(mine, text, variants)
    assert sum(read) <= 40 + 8 * (59 - 40)
    read.clear()
    score(mine, text, variants[:1].repeat(30, 1))
    assert sum(read) <= 40 + 19, "a variant that comes twice is scored once"


def test_wrong_variants_are_refused_and_none_are_no_work():
    mine, text = model("tiny-llama"), passage("tiny-llama")
    with pytest.raises(ValueError, match=r"variants of passage 'a text' are ids \[n, 30\], not \[2, 29\]"):
        score(mine, text, torch.zeros(2, 29, dtype=torch.long))
    assert score(mine, text, torch.zeros(0, 30, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="a causal model reads passages with no source"):
        losses(mine, [passage("tiny-t5")])
    with pytest.raises(ValueError, match="an encoder-decoder reads passages with a source"):
        gradients(model("tiny-t5"), text)
    with pytest.raises(ValueError, match="has 300 tokens, more than the context of 256"):
        score(mine, passage("tiny-llama", 300, 200), torch.zeros(1, 200, dtype=torch.long))


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3-text", "tiny-gpt-neox", "tiny-t5"])
def test_a_planted_token_is_found_and_hurts(family):
    """A row that lies far along the gradient of one position is the first candidate there, and its true loss says so."""
    mine, text = head_of_its_own(family), passage(family)
    gradient = gradients(mine, text)
    position = int(gradient.norm(dim=1).argmax())
    rows = embedding(mine).weight.data
    rows[77] = (
        rows[text.attacked[position]] + gradient[position] / gradient[position].norm() * rows.norm(dim=1).max() * 3
    )
    may = torch.ones(len(rows), dtype=torch.bool)
    named = candidates(gradients(mine, text), rows, text.attacked, may, 5)
    assert named[position, 0] == 77
    variants = torch.tensor([text.attacked]).repeat(5, 1)
    variants[:, position] = named[position]
    found = score(mine, text, variants)
    assert found[0] > naive(mine, text)
    assert found.tolist() == pytest.approx([naive(mine, text.changed(v)) for v in variants.tolist()], abs=1e-6)
    descending = candidates(gradients(mine, text), rows, text.attacked, may, len(rows) - 1, ascend=False)
    assert descending[position, -1] == 77


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    allowed=st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda a: sum(a) > 3),
    ascend=st.booleans(),
    own=st.booleans(),
)
def test_candidates_are_the_best_of_the_allowed_and_no_others(seed, allowed, ascend, own):
    stream = torch.Generator().manual_seed(seed)
    gradient, rows = (torch.randn(n, 5, generator=stream, dtype=torch.float64) for n in (4, 12))
    tokens, may = torch.randint(0, 12, (4,), generator=stream).tolist(), torch.tensor(allowed)
    named = candidates(gradient, rows, tokens, may, 2, ascend=ascend, own=own)
    for position, token in enumerate(tokens):
        change = [float((rows[v] - rows[token]) @ gradient[position]) for v in range(12)]
        order = sorted(
            (v for v in range(12) if allowed[v] and (own or v != token)),
            key=lambda v: -change[v] if ascend else change[v],
        )
        assert named[position].tolist() == order[:2]
    most = sum(allowed) - (not own)
    with pytest.raises(ValueError, match=f"there are {most} allowed ids to choose from"):
        candidates(gradient, rows, tokens, may, most + 1, own=own)


def test_passages_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match="the target begins at 0, so nothing stands before it"):
        Passage("x", (1, 2, 3), 0)
    with pytest.raises(ValueError, match="its target has no tokens"):
        Passage("x", (1, 2, 3), 3)
    with pytest.raises(ValueError, match="a source needs a token"):
        Passage("x", (1, 2), source=())
    text = Passage("x", (1, 2, 3), 2)
    assert text.changed((7, 8, 9)) == Passage("x", (7, 8, 9, 3), 3) and text.changed((7, 8, 9)).targets == text.targets
    assert Passage("x", (1, 2), source=(5,)).changed((6, 7)) == Passage("x", (1, 2), source=(6, 7))
    may = torch.tensor([True, True, False, True])
    assert attackable(Passage("x", (2, 1, 2, 3), 3), may) == [1]
