"""HotFlip and attacked answers against plain forwards of transformers, and what they refuse."""

import json
import math
from itertools import pairwise

import pytest
import torch

from lesion import packaged
from lesion.excerpts import spoken
from lesion.flips import allowed, stable, table
from lesion.measures import Attacked, Generation, Hotflip, Perplexity, Prose, Surprisal, Trigger
from lesion.steps import Noise
from lesion.subjects import Scratch
from lesion.trial import Reading, Trial

SMALL = {"documents": 3, "prompt": 16, "target": 6, "flips": 3, "candidates": 8, "each": 2, "draws": 3}
MANNERS = ["described", "iterative", "random", "query"]
FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-opt", "tiny-gemma3-text", "tiny-decoder", "tiny-t5"]
CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def specimen(family="tiny-llama", chat=False):
    found = Scratch(architecture=family).load()
    found.recall = lambda reading: list(reading.measure.read(found, reading.measure.items(found)))
    if chat:
        found.tokenizer.chat_template = CHAT
    return found


def read(here, measure):
    return [row for chunk in measure.chunks(measure.items(here)) for row in measure.read(here, chunk)]


def naive(model, before, targets):
    """Mean −ln p of the targets behind these tokens, in float64."""
    ids = torch.tensor([before])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            labels = torch.tensor([targets])
            return float(model(input_ids=ids, labels=labels).loss)
        logits = model(torch.cat((ids, torch.tensor([targets])), 1)).logits[0].log_softmax(-1)
    return -sum(float(logits[len(before) - 1 + i, t]) for i, t in enumerate(targets)) / len(targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reported_loss_is_that_of_a_plain_forward_and_no_target_ever_changes(family):
    here = specimen(family)
    found = {m: read(here, Hotflip(**SMALL, manner=m).pin()) for m in MANNERS}
    double = Scratch(architecture=family).load().model.double()
    may = allowed(here.tokenizer, len(table(here.model)))
    special = set(here.tokenizer.all_special_ids)
    for manner, rows in found.items():
        for row in rows:
            assert row["outcome"] == "attacked" and len(row["losses"]) == len(row["ids"]) + 1 == len(
                row["stable_after"]
            )
            if manner in ("described", "random"):
                assert len(row["ids"]) == 3
            text = list(row["text_ids"])
            for n, loss in enumerate(row["losses"]):
                if n:
                    assert text[row["positions"][n - 1]] != row["ids"][n - 1]
                    text[row["positions"][n - 1]] = row["ids"][n - 1]
                assert loss == pytest.approx(naive(double, text, row["target_ids"]), rel=2e-5), (manner, n)
                assert row["stable_after"][n] == stable(here.tokenizer, text)
            assert all(bool(may[id]) and id not in special for id in row["ids"])
            assert len(set(row["positions"])) == len(row["positions"])
        whole = here.tokenizer(next(iter_documents()))["input_ids"]
        assert rows[0]["text_ids"] + rows[0]["target_ids"] == whole[:22]
    for row in found["random"]:
        last = [losses[-1] for losses in row["draws"]]
        assert max(last) == pytest.approx(row["losses"][-1], rel=1e-6) and len(last) == 3
    for one, other in zip(found["iterative"], found["query"], strict=True):
        assert one["losses"] == sorted(one["losses"])
        if len(one["ids"]) == 3:
            assert one["scorings"] == other["scorings"] == 1 + 3 * 8
        assert (one["gradients"], other["gradients"]) == (3, 0)


@pytest.mark.parametrize("family", ["tiny-mistral", "tiny-gemma3-text", "tiny-gemma3", "tiny-decoder", "tiny-qwen2"])
def test_losses_of_texts_longer_than_a_sliding_window_are_those_of_a_plain_forward(family):
    here = specimen(family)
    double = Scratch(architecture=family).load().model.double()
    for manner in ("iterative", "random"):
        for row in read(here, Hotflip(**{**SMALL, "documents": 2, "prompt": 70}, manner=manner).pin()):
            text = list(row["text_ids"])
            for n, loss in enumerate(row["losses"]):
                if n:
                    text[row["positions"][n - 1]] = row["ids"][n - 1]
                assert loss == pytest.approx(naive(double, text, row["target_ids"]), rel=2e-5)


def iter_documents():
    from lesion.texts import corpus

    return (d.text for d in corpus("austen"))


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-t5"])
def test_flips_replayed_on_the_same_model_give_the_same_numbers_and_on_another_its_own(family):
    here = specimen(family)
    source = Hotflip(**SMALL).pin()
    rows = read(here, source)
    replay = Hotflip(**SMALL, manner="replay", replay=Reading(trial=here.trial, measure=source)).pin()
    again = read(here, replay)
    for one, other in zip(rows, again, strict=True):
        for name in ("item", "tokens", "text_ids", "target_ids", "positions", "ids", "losses", "stable"):
            assert one[name] == other[name]
        assert (other["scorings"], other["gradients"]) == (0, 0)
    elsewhere = Scratch(architecture=family, seed=1).load()
    elsewhere.recall = lambda reading: rows
    moved = read(elsewhere, replay)
    double = Scratch(architecture=family, seed=1).load().model.double()
    for one, other in zip(rows, moved, strict=True):
        assert one["ids"] == other["ids"] and one["losses"] != other["losses"]
        text = list(one["text_ids"])
        for at, id in zip(one["positions"], one["ids"], strict=True):
            text[at] = id
        assert other["losses"][-1] == pytest.approx(naive(double, text, one["target_ids"]), rel=2e-5)
    fewer = read(elsewhere, replay.model_copy(update={"flips": 1}))
    assert [row["losses"] for row in fewer] == [pytest.approx(row["losses"][:2], rel=1e-6) for row in moved]


def test_summary_is_of_the_rows_and_random_tells_the_mean_draw_too():
    here = specimen()
    measure = Hotflip(**SMALL, manner="random").pin()
    rows = read(here, measure)
    found = measure.summarise(rows)
    assert found["n"] == 3 and found["not_finite"] == 0
    assert found["increase"] == pytest.approx(sum(r["losses"][-1] - r["losses"][0] for r in rows) / 3)
    draws = [d for r in rows for d in r["draws"]]
    assert found["mean_increase"] == pytest.approx(sum(d[-1] - d[0] for d in draws) / len(draws))
    assert found["mean_increase"] < found["increase"]
    fake = [
        {**rows[0], "losses": [1.0, 1.2, 1.2], "draws": [[1.0, 1.0]]},
        {**rows[1], "losses": [1.0, 1.6], "draws": [[1.0, 2.0]]},
    ]
    told = measure.summarise(fake)
    assert (told["success_relative"], told["success_0.1"], told["success_0.5"], told["success_1"]) == (1, 1, 0.5, 0)
    assert told["mean_success_1"] == 0.5
    ruined = [{**rows[0], "outcome": "not finite", "losses": None}]
    assert measure.summarise(ruined)["increase"] is None and measure.summarise(ruined)["not_finite"] == 1


def test_a_model_that_is_not_finite_is_an_outcome(lab):
    ruined = Trial(subject=Scratch())
    for _ in range(7):
        ruined = ruined >> Noise(site="all", sigma=1e6)
    readings = [Reading(trial=ruined, measure=Hotflip(**SMALL, manner=m).pin()) for m in MANNERS]
    store = lab.take(readings)
    assert not store.index.failures
    for reading in readings:
        assert {row["outcome"] for row in store.rows([reading.key])} == {"not finite"}
        assert store.index.seals[reading.key].summary["n"] == 0


def test_stable_attacks_are_stable_at_every_flip_and_none_where_nothing_is(monkeypatch):
    """Bytes are always stable, so a pair of them is declared not to be."""
    here = specimen()
    from lesion import flips

    real = flips.stable
    e, t = here.tokenizer("et")["input_ids"]
    monkeypatch.setattr(
        flips,
        "stable",
        lambda tok, ids: real(tok, ids) and not any(a == t and b != e for a, b in pairwise(ids)),
    )
    loose = [read(here, Hotflip(**SMALL, manner=m).pin()) for m in MANNERS]
    assert not all(all(row["stable_after"]) for rows in loose for row in rows)
    for manner in MANNERS:
        for row in read(here, Hotflip(**SMALL, manner=manner, stable=True).pin()):
            if row["ids"]:
                assert all(row["stable_after"][1:]) and row["stable"]


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5"])
def test_of_a_question_only_the_askers_words_are_attacked_and_the_answer_is_scored(family):
    here = specimen(family, chat=True)
    asking = Generation(prompts=4, new_tokens=8, seed=1).pin()
    clean = {row["item"]: row for row in read(here, asking)}
    of = Reading(trial=here.trial, measure=asking)
    for manner in ("described", "iterative", "random", "query"):
        rows = read(here, Hotflip(**{**SMALL, "documents": 0, "flips": 200, "draws": 2}, of=of, manner=manner).pin())
        assert [row["item"] for row in rows] == list(clean)
        for row in rows:
            if row["outcome"] == "empty":
                assert not clean[row["item"]]["text"]
                continue
            question = clean[row["item"]]["asked"]
            assert row["text_ids"] == list(asking.tokenise(here, question))
            text = here.tokenizer.decode(row["text_ids"])
            assert text == f"<bos>user: {question}<eos>\n<bos>assistant: "
            start = len(here.tokenizer("<bos>user: ")["input_ids"])
            size = len(here.tokenizer(question)["input_ids"])
            assert row["positions"] and all(start <= at < start + size for at in row["positions"])
            if manner in ("described", "random"):
                assert len(row["positions"]) == size == len(set(row["positions"])), "two hundred flips are all words"
            answer = here.tokenizer(clean[row["item"]]["text"], add_special_tokens=False)["input_ids"]
            assert row["target_ids"] == answer[: SMALL["target"]]


def test_the_askers_words_are_found_behind_a_system_message_that_says_the_same():
    here = specimen()
    here.tokenizer.chat_template = "<bos>system: Say hello.<eos>" + CHAT
    asking = Generation()
    tokens, words = spoken(here, asking, " Say hello.\n")
    assert here.tokenizer.decode([tokens[i] for i in words]) == "Say hello." and words[0] == 27
    here.tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="does not say 'Say hello.' as it was asked"):
        spoken(here, asking, "Say hello.")


def test_what_cannot_be_attacked_is_refused_by_name(tmp_path):
    here = specimen()
    short = tmp_path / "short.jsonl"
    short.write_text('{"id": "long", "text": "a long enough text, this"}\n{"id": "brief", "text": "brief"}\n')
    with pytest.raises(
        ValueError, match="document 'brief' has 5 tokens: an attack on the first 5 leaves none to score"
    ):
        read(here, Hotflip(**{**SMALL, "prompt": 5}, corpus=str(short)).pin())
    assert read(here, Hotflip(**{**SMALL, "prompt": 4}, corpus=str(short)).pin())[1]["target_ids"] == [ord("f") - 33]
    with pytest.raises(ValueError, match="'austen/chapter-01' has 306 tokens, more than the context of 256"):
        read(here, Hotflip(**{**SMALL, "prompt": 300}).pin())
    asked = Reading(trial=here.trial, measure=Generation(battery="picture", prompts=1).pin())
    row = {"item": "p#0", "asked": "What?", "text": "a", "image": "kitchen", "group": "picture"}
    here.recall = lambda reading: [row]
    with pytest.raises(ValueError, match="item 'p#0' shows a picture"):
        read(here, Hotflip(**SMALL, of=asked).pin())
    here.recall = lambda reading: [{**row, "image": None, "text": ""}]
    (empty,) = read(here, Hotflip(**SMALL, of=asked).pin())
    assert empty["outcome"] == "empty" and empty["losses"] is None
    here.recall = lambda reading: [{**row, "image": None, "asked": "What? " * 50}]
    with pytest.raises(ValueError, match="passage 'p#0' has 301 tokens, more than the context of 256"):
        read(here, Hotflip(**SMALL, of=asked).pin())


def test_specs_that_mean_nothing_are_refused():
    here = Trial(subject=Scratch())
    flips = Reading(trial=here, measure=Hotflip())
    with pytest.raises(ValueError, match="go together, not 'replay' and None"):
        Hotflip(manner="replay")
    with pytest.raises(ValueError, match="go together, not 'query'"):
        Hotflip(manner="query", replay=flips)
    with pytest.raises(ValueError, match="those of a hotflip reading, not of 'perplexity'"):
        Hotflip(manner="replay", replay=Reading(trial=here, measure=Perplexity()))
    with pytest.raises(ValueError, match="those of a generation, and 'perplexity' asks none"):
        Hotflip(of=Reading(trial=here, measure=Perplexity()))
    asked = Reading(trial=here, measure=Generation())
    with pytest.raises(ValueError, match="one of hotflip, trigger, not 'generation'"):
        Attacked(clean=asked, attack=asked)
    with pytest.raises(ValueError, match="clean questions are those of a generation"):
        Attacked(clean=flips, attack=flips)


def test_a_replay_of_other_texts_is_refused():
    here = specimen()
    source = Hotflip(**SMALL).pin()
    replay = Hotflip(**{**SMALL, "prompt": 17}, manner="replay", replay=Reading(trial=here.trial, measure=source)).pin()
    with pytest.raises(ValueError, match="'austen/chapter-01' is not the same tokens here"):
        read(here, replay)
    more = Hotflip(**{**SMALL, "documents": 4}, manner="replay", replay=replay.replay).pin()
    with pytest.raises(ValueError, match="no row for 'austen/chapter-04'"):
        read(here, more)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5"])
def test_attacked_answers_are_what_the_model_writes_after_the_changed_tokens(family, chat):
    here = specimen(family, chat)
    asking = Generation(prompts=5, new_tokens=10, seed=3, batch=2).pin()
    clean = Reading(trial=here.trial, measure=asking)
    flips = Hotflip(**{**SMALL, "documents": 0}, of=clean).pin()
    attack = Reading(trial=here.trial, measure=flips)
    measure = Attacked(clean=clean, attack=attack)
    rows, attacks = read(here, measure), {row["item"]: row for row in read(here, flips)}
    answers = {row["item"]: row for row in read(here, asking)}
    assert [row["item"] for row in rows] == [item for item in answers if attacks[item]["outcome"] == "attacked"]
    from lesion.asking import end_tokens
    from lesion.decode import Prompt, continue_texts
    from lesion.sampling import Sampling

    for row in rows:
        was, how = attacks[row["item"]], answers[row["item"]]
        text = list(was["text_ids"])
        for at, id in zip(was["positions"], was["ids"], strict=True):
            text[at] = id
        assert row["read_ids"] == text and row["asked"] in here.tokenizer.decode(text)
        assert len(row["asked"]) == len(how["asked"].strip()), "a byte for a byte"
        (alone,) = continue_texts(
            here.model, [Prompt(row["item"], tuple(text))], Sampling(top_k=64, top_p=0.95),
            new_tokens=10, ends=end_tokens(here), seed=3, batch=1,
        )  # fmt: skip
        assert row["text"] == here.tokenizer.decode(alone.tokens, skip_special_tokens=True).strip()
        assert (row["clean_text"], row["clean_correct"], row["clean_asked"]) == (
            how["text"],
            how["correct"],
            how["asked"],
        )
        assert {name for name in how} <= row.keys()
    found = measure.summarise(rows)
    assert found["graded"] == len(rows) and found["clean_accuracy"] is not None
    one = Attacked(clean=clean, attack=attack, flips=1)
    for row in read(here, one):
        assert sum(a != b for a, b in zip(row["read_ids"], attacks[row["item"]]["text_ids"], strict=True)) == 1


def test_an_attack_that_changes_nothing_changes_no_answer():
    here = specimen(chat=True)
    asking = Generation(prompts=5, new_tokens=10, seed=3, batch=2).pin()
    clean = Reading(trial=here.trial, measure=asking)
    answers = read(here, asking)
    flips = Reading(trial=here.trial, measure=Hotflip(of=clean).pin())
    idle = [
        {
            "item": row["item"],
            "outcome": "attacked",
            "text_ids": list(asking.tokenise(here, row["asked"])),
            "positions": [],
            "ids": [],
        }
        for row in answers
    ]
    recalled = {clean.key: answers, flips.key: idle}
    here.recall = lambda reading: [dict(row) for row in recalled[reading.key]]
    rows = read(here, Attacked(clean=clean, attack=flips))
    for row, before in zip(rows, answers, strict=True):
        assert {name: row[name] for name in before if name != "duration"} == {
            k: v for k, v in before.items() if k != "duration"
        }
    found = Attacked(clean=clean, attack=flips).summarise(rows)
    assert (found["same_text"], found["lost"], found["gained"]) == (1, 0, 0)
    idle[0]["text_ids"] = idle[0]["text_ids"][::-1]
    with pytest.raises(ValueError, match="not the same tokens here as in the attack"):
        read(here, Attacked(clean=clean, attack=flips))


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_trigger_stands_before_the_askers_words(chat):
    here = specimen(chat=chat)
    asking = Generation(prompts=3, new_tokens=6, seed=3).pin()
    clean = Reading(trial=here.trial, measure=asking)
    sought = Trigger(searched=1, documents=1, tokens=16, length=3, restarts=1, iterations=1, topk=3, controls=1).pin()
    attack = Reading(trial=here.trial, measure=sought)
    trigger = read(here, sought)[0]["trigger"]
    rows, answers = read(here, Attacked(clean=clean, attack=attack)), read(here, asking)
    assert len(rows) == len(answers) == 3 and len(trigger) == 3
    said = here.tokenizer.decode(trigger)
    for row, before in zip(rows, answers, strict=True):
        assert row["asked"] == said + before["asked"]
        whole = f"<bos>user: {row['asked']}<eos>\n<bos>assistant: " if chat else row["asked"]
        assert here.tokenizer.decode(row["read_ids"]) == whole
    with pytest.raises(ValueError, match="'trigger' has no flips, so flips=2 means nothing"):
        Attacked(clean=clean, attack=attack, flips=2)


def test_an_answer_that_repeats_the_attack_is_no_right_answer(tmp_path):
    """The attack writes the key into the question, and the model says the question again."""
    battery = tmp_path / "one.jsonl"
    battery.write_text(json.dumps({"id": "q", "prompt": "Name a city now", "answer": {"any": ["Paris"]}}) + "\n")
    here = specimen()
    asking = Generation(battery=str(battery)).pin()
    clean = Reading(trial=here.trial, measure=asking)
    measure = Attacked(clean=clean, attack=Reading(trial=here.trial, measure=Hotflip(of=clean).pin()))
    before = {"item": "q#0", "asked": "Name a city now", "text": "", "correct": False}
    row = {"item": "q#0", "text": "Name a Paris now"}
    found = measure._row(here, row, before, asking.questions(), [1], "Name a Paris now")
    assert found["correct"] is False
    right = measure._row(
        here, {**row, "text": "Name a Paris now? It is Paris"}, before, asking.questions(), [1], "Name a Paris now"
    )
    assert right["correct"] is True


def test_the_walk_takes_what_is_quoted_and_texts_are_read_as_those_of_a_generation(lab):
    healthy = Trial(subject=Scratch())
    damaged = healthy >> Noise(site="mlp", sigma=0.2)
    asking = Generation(prompts=4, new_tokens=8, seed=1).pin()
    readings = []
    for trial in (healthy, damaged):
        clean = Reading(trial=trial, measure=asking)
        attack = Reading(trial=trial, measure=Hotflip(**{**SMALL, "documents": 0}, of=clean).pin())
        answered = Reading(trial=trial, measure=Attacked(clean=clean, attack=attack))
        readings += [
            answered,
            Reading(trial=healthy, measure=Prose(of=answered)),
            Reading(trial=healthy, measure=Surprisal(of=answered)),
        ]
    moved = Hotflip(**{**SMALL, "documents": 0}, of=clean, manner="replay", replay=attack).pin()
    store = lab.take([*readings, Reading(trial=healthy, measure=moved)])
    assert not store.index.failures
    for reading in readings:
        rows = list(store.rows([reading.key]))
        assert rows and all(
            value is None or not isinstance(value, float) or math.isfinite(value) for r in rows for value in r.values()
        )
    assert lab.take(readings).index.seals.keys() == store.index.seals.keys()


def test_every_tiny_family_can_be_attacked():
    for family in packaged.TINY:
        if family == "tiny-smolvlm":
            continue  # shown pictures; its text part is a llama
        rows = read(specimen(family), Hotflip(**{**SMALL, "documents": 1, "flips": 1}).pin())
        assert rows[0]["outcome"] == "attacked", family
