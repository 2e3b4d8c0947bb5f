"""Universal triggers: every number in a row computed again the long way, controls, quotations, and a planted weakness."""

import math

import pytest
import torch

from attacks import naive
from lesion import triggers
from lesion.flips import allowed, gradients, table
from lesion.measures import Perplexity, Trigger
from lesion.passages import Passage
from lesion.stats import generator
from lesion.subjects import Scratch
from lesion.texts import corpus
from lesion.trial import Reading, Trial
from lesion.triggers import Text, ascend, drawn, mean_losses, propose

SMALL = {
    "searched": 2,
    "documents": 3,
    "tokens": 20,
    "length": 3,
    "restarts": 2,
    "iterations": 3,
    "topk": 5,
    "controls": 2,
}


def specimen(family="tiny-llama", **config):
    return Scratch(architecture=family, config=config).load()


def read(here, **options):
    measure = Trigger(**{**SMALL, **options})
    rows = list(measure.read(here, measure.items(here)))
    return measure, rows[0], rows[1:]


def document(here, item, trigger, tokens=20):
    """A document behind a trigger; only its own tokens, without the first, which nothing predicts, are targets."""
    ids = here.tokenizer(next(d.text for d in corpus("austen") if d.id == item))["input_ids"][:tokens]
    if here.model.config.is_encoder_decoder:  # the encoder reads half of it, behind the trigger
        return Passage(item, tuple(ids[tokens // 2 :]), source=(*trigger, *ids[: tokens // 2]))
    return Passage(item, (*trigger, *ids), len(trigger) + 1)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3-text", "tiny-decoder", "tiny-t5"])
@pytest.mark.parametrize("manner", ["gradient", "coordinate"])
def test_rows_can_be_computed_again(family, manner):
    here = specimen(family)
    measure, found, judged = read(here, manner=manner)
    trigger = found["trigger"]
    may = allowed(here.tokenizer, len(table(here.model)))
    assert found["item"] == "trigger" and found["outcome"] == "found" and len(trigger) == 3 and may[trigger].all()
    assert found["stable"] and here.tokenizer(found["text"])["input_ids"] == trigger
    documents = [d.id for d in corpus("austen")]
    assert found["searched"] == documents[:2] and [row["item"] for row in judged] == documents[2:5]
    random = [drawn("trigger control", 0, i, 3, may, here.tokenizer) for i in range(2)]
    for row in judged:
        clean, attacked, *others = (naive(here.model, document(here, row["item"], t)) for t in ([], trigger, *random))
        assert row["tokens"] == (10 if family == "tiny-t5" else 19) and row["outcome"] == "judged"
        assert row["clean"] == pytest.approx(clean, rel=1e-5) and row["attacked"] == pytest.approx(attacked, rel=1e-5)
        assert row["random"] == pytest.approx(sum(others) / 2, rel=1e-5)
        assert row["delta"] == row["attacked"] - row["clean"] and row["delta_random"] == row["random"] - row["clean"]
    searched = [naive(here.model, document(here, item, trigger)) for item in found["searched"]]
    assert found["loss"] == pytest.approx(sum(searched) / 2, rel=1e-5)
    assert found["loss"] == max(max(losses) for losses in found["searches"])
    for losses in found["searches"]:
        assert losses == sorted(losses), "a loss never falls"
    summary = measure.summarise([found, *judged])
    assert summary["delta"] == pytest.approx(sum(row["delta"] for row in judged) / 3)
    assert summary["not_finite"] == 0 and 0 <= summary["raised"] <= 3
    again = read(here, manner=manner)
    strip = lambda row: {k: v for k, v in row.items() if k != "duration"}  # noqa: E731
    assert [strip(found), *map(strip, judged)] == [strip(row) for row in (again[1], *again[2])]


def test_a_start_token_stays_in_front_and_lets_the_first_token_count():
    from tokenizers.processors import TemplateProcessing

    here = specimen()
    here.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    measure = Trigger(**SMALL)
    text = measure._text(here, measure.chosen()["austen/chapter-03"])
    assert text.before == (256,) and text.scored == 0 and len(text.rest) == 19
    assert text.passage((7, 8)).tokens[:3] == (256, 7, 8) and text.passage((7, 8)).targets == text.passage().targets
    assert text.passage().targets == text.rest
    here = specimen()
    text = measure._text(here, measure.chosen()["austen/chapter-03"])
    assert (
        text.before == ()
        and text.scored == 1
        and text.passage((7, 8)).targets == text.passage().targets == text.rest[1:]
    )


def test_what_an_encoder_reads_keeps_its_end_token_and_the_trigger_stands_before_the_text():
    from tokenizers.processors import TemplateProcessing

    here = specimen("tiny-t5")
    here.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 257)]
    )
    text = Trigger(**SMALL)._text(here, corpus("austen")[2])
    words = here.tokenizer(corpus("austen")[2].text, add_special_tokens=False)["input_ids"][:20]
    passage = text.passage((7, 8))
    assert passage.source == (7, 8, *words[:10], 257) and passage.targets == tuple(words[10:])


def texts(here, n=3, length=14):
    tokens = [tuple(here.tokenizer(d.text)["input_ids"][:length]) for d in corpus("austen")[:n]]
    return [Text(str(i), (), ids, 1) for i, ids in enumerate(tokens)]


def test_one_iteration_is_the_best_of_all_its_candidates_position_by_position():
    here = specimen()
    may, some = allowed(here.tokenizer, len(table(here.model))), texts(here)
    start = drawn("start", 3, 0, 4, may)
    how = {"iterations": 1, "topk": 6, "draw": lambda i: None, "keeps": lambda tokens: True}
    found = ascend(here.model, some, list(start), may, manner="gradient", beam=1, **how)
    named, trigger = propose(here.model, some, start, may, "gradient", 6, None), list(start)
    mean = lambda t: sum(naive(here.model, text.passage(t)) for text in some) / len(some)  # noqa: E731
    for position in range(4):
        tried = [[*trigger[:position], v, *trigger[position + 1 :]] for v in [trigger[position], *named[position]]]
        trigger = max(tried, key=mean)
    assert found.trigger == trigger and found.loss == pytest.approx(mean(trigger), rel=1e-6)
    wide = ascend(here.model, some, list(start), may, manner="gradient", beam=3, **how)
    assert wide.loss >= found.loss - 1e-6 and wide.scored > found.scored
    same = mean_losses(here.model, some, [start, trigger])
    assert same.tolist() == pytest.approx([mean(start), mean(trigger)], rel=1e-6)


def test_the_gradient_is_averaged_over_the_texts():
    here = specimen()
    model, some = here.model.double(), texts(here)
    may, trigger = allowed(here.tokenizer, len(table(model))), [5, 6]
    named = propose(model, some, trigger, may, "gradient", 3, None)
    rows = table(model)
    total = torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for text in some:
        passage = text.passage(trigger)
        embedded = rows[torch.tensor([passage.tokens])].clone().requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0, passage.target - 1 : -1]
        loss = -logits.log_softmax(-1)[range(len(passage.targets)), passage.targets].mean()
        total += torch.autograd.grad(loss, embedded)[0][0, :2]
    change = (total @ rows.T).masked_fill(~may, -torch.inf)
    change[[0, 1], trigger] = -torch.inf
    assert named == change.topk(3).indices.tolist()


def test_coordinate_ascent_tries_all_allowed_ids():
    here = specimen()
    may = allowed(here.tokenizer, len(table(here.model)))
    named = propose(here.model, [], [0], may, "coordinate", 4000, generator("test", 0))
    assert set(named[0]) == set(may.nonzero()[:, 0].tolist())


def test_a_planted_weakness_is_found_and_carries_over_to_other_documents():
    """Planted: one row so long, along the gradient, that whatever reads it is disturbed."""
    here = specimen(tie_word_embeddings=False)
    weak = here.tokenizer("~")["input_ids"][0]
    may, some = allowed(here.tokenizer, len(table(here.model))), texts(here)
    gradient = sum(gradients(here.model, text.passage([1]))[0] for text in some)
    with torch.no_grad():
        rows = here.model.get_input_embeddings().weight
        rows[weak] = gradient / gradient.norm() * rows.norm(dim=1).max() * 2
    assert propose(here.model, some, [1], may, "gradient", 1, None) == [[weak]]
    _, found, judged = read(here, length=2, topk=8)
    assert "~" in found["text"]
    assert all(row["delta"] > row["delta_random"] for row in judged)


@pytest.mark.parametrize("options", [{}, {"length": 5}])
def test_a_quoted_trigger_is_judged_and_nothing_is_sought(options, monkeypatch):
    other = specimen("tiny-gpt-neox")
    _, found, _ = read(other)
    here = specimen()
    here.recall = lambda reading: [found]
    monkeypatch.setattr(triggers, "ascend", lambda *_, **__: 1 / 0)
    quote = Reading(trial=Trial(subject=Scratch(architecture="tiny-gpt-neox")), measure=Trigger(**SMALL))
    _, row, judged = read(here, quote=quote, **options)
    assert row["trigger"] == found["trigger"] and row["outcome"] == "quoted" and row["scored"] == 0
    for r in judged:
        assert r["attacked"] == pytest.approx(naive(here.model, document(here, r["item"], found["trigger"])), rel=1e-5)


def test_another_tokenizer_reads_a_quoted_trigger_from_its_text():
    here = specimen()
    there = {"item": "trigger", "trigger": [3, 4000], "text": "hello"}
    here.recall = lambda reading: [there]
    quote = Reading(trial=Trial(subject=Scratch()), measure=Trigger(**SMALL))
    _, row, _ = read(here, quote=quote)
    assert row["trigger"] == here.tokenizer("hello")["input_ids"] and row["outcome"] == "quoted as text"
    there["text"] = ""
    with pytest.raises(ValueError, match="the quoted trigger '' has no tokens here"):
        read(here, quote=quote)


def test_what_cannot_be_asked_is_refused():
    here = specimen()
    with pytest.raises(
        ValueError, match="a trigger of 240 tokens before the 20 of document 'austen/.*' exceeds the context of 256"
    ):
        read(here, length=240)
    with pytest.raises(ValueError, match="documents; 99 for the search leave none to judge by"):
        read(here, searched=99)
    with pytest.raises(ValueError, match="quote must be a reading by trigger, not by perplexity"):
        Trigger(quote=Reading(trial=Trial(subject=Scratch()), measure=Perplexity()))


def test_documents_without_tokens_are_refused(tmp_path):
    (tmp_path / "two.txt").write_text("one is here\n\f\n\n\f\nthree\n")
    with pytest.raises(ValueError, match="scores no token"):
        read(specimen(), corpus=str(tmp_path / "two.txt"), searched=1, documents=1)


def test_a_model_of_nan_is_said_to_be_one():
    here = specimen(tie_word_embeddings=False)
    with torch.no_grad():
        here.model.get_output_embeddings().weight[5] = math.nan
    measure, found, judged = read(here)
    assert found["outcome"] == "not finite" and found["loss"] is None
    assert all(row["outcome"] == "not finite" and row["clean"] is None for row in judged)
    assert measure.summarise([found, *judged])["delta"] is None


def test_pinning_pins_the_corpus_and_the_quoted_reading():
    quote = Reading(trial=Trial(subject=Scratch()), measure=Trigger(**SMALL))
    pinned = Trigger(**SMALL, quote=quote).pin()
    assert pinned.sha256 and pinned.quote.measure.sha256 == pinned.sha256


def test_the_walk_takes_a_quoted_trigger_first(lab):
    """Transfer: what one model's trigger does to another, in one call; and again at no cost."""
    here, there = Scratch(), Scratch(seed=1)
    own = Trigger(**SMALL)
    foreign = Trigger(**SMALL, quote=Reading(trial=Trial(subject=there), measure=own))
    rows = lab.read([here], [own, foreign]).to_dicts()
    mine, quoted = (next(r for r in rows if r["item"] == "trigger" and r["outcome"] == o) for o in ("found", "quoted"))
    found = next(r for r in lab.read([there], [own]).to_dicts() if r["item"] == "trigger")
    assert quoted["trigger"] == found["trigger"] != mine["trigger"] and quoted["text"] == found["text"]
    clean = [[r["clean"] for r in rows if r["outcome"] == "judged"][i::3] for i in range(3)]
    assert all(len(set(same)) == 1 for same in clean), "both are compared with the same clean loss"
