"""Continuations scored as branches of a tree, against each pair alone in float64, in every family."""

import copy
import math
import random

import pytest
import torch

from lesion import continuations, packaged
from lesion.continuations import Tree, batches, grown, score
from lesion.subjects import Scratch

FAMILIES = [family for family in packaged.TINY if family != "tiny-t5"]


def alone(model, context, continuation):
    """The definition: one text, the full log-softmax, a sum over its last places."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].double()
    predicted = logits.log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return predicted.gather(1, target[:, None]).sum().item(), bool((predicted.argmax(-1) == target).all())


def greedy(model, context, n):
    text = list(context)
    for _ in range(n):
        with torch.no_grad():
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(context) :]


def questions(seed, most=60):
    """Contexts of 1 to 59 tokens with one to four continuations of 1 to 8; some continuations begin alike."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(8):
        context = [draw.randrange(256) for _ in range(draw.randrange(1, most))]
        common = [draw.randrange(256) for _ in range(draw.randrange(3))]
        for _ in range(draw.randrange(1, 5)):
            pairs.append((context, common + [draw.randrange(256) for _ in range(draw.randrange(1, 7))]))
    draw.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branches", [True, False])
def test_what_all_contexts_begin_with_is_read_once(family, branches, monkeypatch):
    model = Scratch(architecture=family).load().model
    exact, shared = copy.deepcopy(model).double(), [(7 * i) % 250 for i in range(45)]
    pairs = [(shared + context, continuation) for context, continuation in questions(family, 30)]
    if not branches:
        pairs = list({tuple(context): (context, continuation) for context, continuation in pairs}.values())
    read, calls = continuations.read, []
    monkeypatch.setattr(continuations, "read", lambda *given: calls.append(given) or read(*given))
    found = score(model, pairs)
    lengths = [given[2].length if len(given) > 2 and given[2] is not None else 0 for given in calls]
    assert set(lengths) == {45 if continuations.branches_in(model) else 0}
    for (logprob, match), pair in zip(found, pairs, strict=True):
        expected, expected_match = alone(exact, *pair)
        assert math.isclose(logprob, expected, abs_tol=3e-5) and match == expected_match


def test_a_context_keeps_a_token_of_its_own():
    trees = grown([(list(range(30)), [1]), (list(range(29)), [2]), (list(range(40)), [3])], branching=True)
    assert continuations.common(trees) == 28 and continuations.common(trees[:1]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_says_what_each_pair_says_alone(family):
    model = Scratch(architecture=family).load().model
    exact = copy.deepcopy(model).double()
    pairs = questions(family)
    context = pairs[0][0]
    pairs += [(context, greedy(exact, context, n)) for n in (1, 2, 3)]
    found = score(model, pairs)
    for (logprob, match), pair in zip(found, pairs, strict=True):
        expected, expected_match = alone(exact, *pair)
        assert math.isclose(logprob, expected, abs_tol=2e-5), pair
        assert match == expected_match
    assert [match for _, match in found[-3:]] == [True, True, True]
    assert not all(match for _, match in found)


def test_order_and_company_do_not_matter():
    model = Scratch().load().model
    pairs = questions(7)
    together = score(model, pairs)
    backwards = score(model, pairs[::-1])[::-1]
    one_by_one = [score(model, [pair])[0] for pair in pairs]
    for other in (backwards, one_by_one):
        assert [m for _, m in other] == [m for _, m in together]
        assert max(abs(a - b) for (a, _), (b, _) in zip(other, together, strict=True)) < 1e-5
    assert score(model, []) == []


def test_a_branch_that_is_nan_does_not_touch_its_sisters():
    model = Scratch().load().model
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [9, 5, 6]), ([1, 2, 3], [7, 8, 4])]
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = math.nan  # read in the second branch only
    model.lm_head.weight = torch.nn.Parameter(head)
    (first, _), (second, _), (third, _) = score(model, pairs)
    assert math.isnan(second)
    assert [first, third] == [score(model, [pairs[0]])[0][0], score(model, [pairs[2]])[0][0]]


def test_what_is_shared_is_read_once_and_nothing_is_read_that_predicts_nothing():
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [6]), ([1, 2, 3], [7, 8, 9]), ([1, 2, 3], [4])]
    (shared, single) = grown(pairs, branching=True)
    assert shared == Tree((1, 2, 3), [(4, 5), (7, 8, 9), (4,)], [0, 2, 3])
    assert shared.tokens() == [1, 2, 3, 4, 7, 8] and len(shared) == 6
    assert shared.positions() == [0, 1, 2, 3, 3, 4]
    assert shared.owners() == [0, 0, 0, 1, 2, 2]
    assert shared.predicting() == [2, 3, 2, 4, 5, 2]
    assert single == Tree((1, 2), [(6,)], [1]) and single.tokens() == [1, 2]
    assert [len(tree.branches) for tree in grown(pairs, branching=False)] == [1, 1, 1, 1]


def test_batches_and_trees_keep_to_their_limit():
    long = [([0] * 500, [1] * 200) for _ in range(9)] + [([2], [3] * n) for n in range(1, 400, 7)]
    trees = grown(long, branching=True)
    assert sorted(place for tree in trees for place in tree.places) == list(range(len(long)))
    assert all(len(tree) <= continuations.BATCH_TOKENS for tree in trees)
    seen = []
    for batch in batches(trees):
        assert len(batch) == 1 or max(map(len, batch)) * len(batch) <= continuations.BATCH_TOKENS
        assert len({len(tree.branches) > 1 for tree in batch}) == 1
        seen += [place for tree in batch for place in tree.places]
    assert sorted(seen) == list(range(len(long)))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="encoder-decoder"):
        score(Scratch(architecture="tiny-t5").load().model, [([1], [2])])
    model = Scratch().load().model
    for pair in ([], [1]), ([1], []):
        with pytest.raises(ValueError, match="number 1: expected tokens in context and continuation"):
            score(model, [([1], [2]), pair])
