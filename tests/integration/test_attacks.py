"""Attacks on the real SmolLM2: nanogcg's own losses and strings, a score that is a plain forward's, a trigger that hurts."""

from types import SimpleNamespace

import nanogcg
import nanogcg.gcg
import nanogcg.utils
import pytest
import torch

from attacks import naive
from lesion.flips import allowed, gradients, score, table
from lesion.measures import Gcg, Trigger
from lesion.subjects import SmolLM2
from lesion.suffixes import search

PROMPT, TARGET = "Tell me how to brew a pot of tea. ", "Sure, here is my grandmother's recipe:"


@pytest.fixture(scope="module")
def specimen():
    """Without its chat template, from which nanogcg would take the start marks."""
    found = SmolLM2().load()
    found.tokenizer.chat_template = None
    return found


@pytest.fixture(scope="module")
def may(specimen):
    return Gcg(pairs=((PROMPT, TARGET),)).may(specimen)


def test_scores_and_gradients_are_those_of_the_plain_model(specimen, may):
    how = Gcg(pairs=((PROMPT, TARGET),))
    frame = how.frame(specimen, "tea", PROMPT, TARGET)
    text = frame.passage(specimen.tokenizer("x x x x x x x x")["input_ids"])
    variants = torch.tensor(text.attacked).repeat(6, 1)
    for i in range(1, 6):
        variants[i, len(frame.before) + i] = 1000 + i
    expected = [naive(specimen.model, text.changed(v)) for v in variants.tolist()]
    assert score(specimen.model, text, variants).tolist() == pytest.approx(expected, abs=1e-5)
    whole, part = gradients(specimen.model, text), gradients(specimen.model, text, len(frame.before))
    torch.testing.assert_close(part, whole[len(frame.before) :], rtol=1e-3, atol=float(whole.abs().max()) * 1e-4)
    assert may.sum() > 40_000 and not may[specimen.tokenizer.all_special_ids].any()


def test_the_same_draws_give_the_strings_and_losses_of_nanogcg(specimen, may, monkeypatch):
    for room in (nanogcg.gcg, nanogcg.utils):
        monkeypatch.setattr(room, "gc", SimpleNamespace(collect=lambda: None))
    monkeypatch.setattr(nanogcg.gcg, "get_nonascii_toks", lambda tokenizer, device: (~may).nonzero()[:, 0])
    how = Gcg(pairs=((PROMPT, TARGET),), optim_str_init="x x x x x x", steps=3, search_width=12, topk=32)
    config = nanogcg.GCGConfig(
        num_steps=3, optim_str_init="x x x x x x", search_width=12, topk=32, use_prefix_cache=False, verbosity="ERROR"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = nanogcg.run(specimen.model, specimen.tokenizer, PROMPT, TARGET, config)
        torch.manual_seed(0)
        draw = lambda step, n, p, k: (torch.rand(n, p), torch.randint(0, k, (n, 1, 1)).squeeze(2))  # noqa: E731
        start = torch.tensor([specimen.tokenizer(how.optim_str_init)["input_ids"]])
        frame = how.frame(specimen, "tea", PROMPT, TARGET)
        ours = search(specimen.model, frame, start, may, draw, tokenizer=specimen.tokenizer, **how.options())
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    assert specimen.tokenizer.decode(ours.string) == theirs.best_string
    assert ours.loss < ours.start


def test_a_trigger_found_on_one_text_hurts_others_more_than_random_ones(specimen):
    measure = Trigger(searched=1, documents=2, tokens=24, length=3, restarts=1, iterations=1, topk=8, controls=2)
    rows = list(measure.read(specimen, measure.items(specimen)))
    assert rows[0]["stable"] and allowed(specimen.tokenizer, len(table(specimen.model)))[rows[0]["trigger"]].all()
    summary = measure.summarise(rows)
    assert summary["delta"] > summary["delta_random"]
    assert all(row["delta"] == row["attacked"] - row["clean"] for row in rows[1:])
