"""Tasks read of a model: log-likelihoods and losses against plain forwards, what is written against `generate`, and teaching."""

import math
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

from lesion import asking
from lesion.measures import Task
from lesion.measures.task import f1
from lesion.steps import Finetune, Lora, Merge, Sft
from lesion.subjects import Scratch
from lesion.task import before
from lesion.trial import Trial
from words import TestPairs, TestSums

FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-t5", "tiny-decoder", "tiny-gpt-neox"]


def load(family="tiny-llama", seed=0):
    return Scratch(architecture=family, seed=seed).load()


def naive(model, prompt, reply):
    """Σ ln p(reply | prompt) in float64."""
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([reply])).logits[0].double()
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shots", [0, 2])
def test_rankings_and_losses_are_those_of_plain_forwards(family, shots):
    specimen = load(family)
    measure = Task(task=TestPairs(), shots=shots)
    text = before(TestPairs(), shots, 0)
    with torch.no_grad():
        for row in measure.read(specimen, measure.items(specimen)):
            e = measure.questions()[row["item"]]
            prompt = asking.prompt(specimen, TestPairs(), e, "plain", text)
            replies = [asking.reply(specimen, TestPairs(), c, "plain") for c in e.choices]
            wanted = [naive(specimen.model, prompt, r) for r in replies]
            assert row["loglikelihoods"] == pytest.approx(wanted, rel=1e-4)
            assert row["chosen"] == wanted.index(max(wanted)) and row["correct"] == (row["chosen"] == 0)
            assert row["nll"] == pytest.approx(-naive(specimen.model, prompt, [*replies[0], 257]), rel=1e-4)
            assert row["nll_tokens"] == len(replies[0]) + 1


def test_normalised_and_calibrated_rankings():
    specimen = load()
    rows = {
        n: Task(task=TestPairs(), normalise=n).read(specimen, ["pair/5"])[0] for n in ("total", "tokens", "calibrated")
    }
    e = TestPairs().examples("test")[0]
    lengths = [len(asking.reply(specimen, TestPairs(), c, "plain")) for c in e.choices]
    total = rows["total"]["loglikelihoods"]
    assert rows["tokens"]["loglikelihoods"] == pytest.approx([t / n for t, n in zip(total, lengths, strict=True)])
    nothing = specimen.tokenizer("N/A:")["input_ids"]
    with torch.no_grad():
        free = [naive(specimen.model, nothing, asking.reply(specimen, TestPairs(), c, "plain")) for c in e.choices]
    assert rows["calibrated"]["loglikelihoods"] == pytest.approx(
        [t - f for t, f in zip(total, free, strict=True)], rel=1e-3
    )


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5"])
def test_what_is_written_is_what_generate_writes(family):
    specimen = load(family, seed=5)
    measure = Task(task=TestSums(), new_tokens=6)
    line = asking.one_line(specimen.tokenizer)
    ends = sorted(asking.end_tokens(specimen) | line.breaks)
    for row in measure.read(specimen, measure.items(specimen)):
        e = measure.questions()[row["item"]]
        ids = torch.tensor([asking.prompt(specimen, TestSums(), e, "plain")])
        with torch.no_grad():
            made = specimen.model.generate(
                ids,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=258,
                attention_mask=torch.ones_like(ids),
            )[0]
        new = made[1:] if family == "tiny-t5" else made[ids.shape[1] :]
        kept = [t for t in new.tolist() if t not in ends]
        assert row["text"] == specimen.tokenizer.decode(kept, skip_special_tokens=True).strip()


def test_f1_is_of_words_and_not_of_places():
    """Where the choices stand in another order for each question."""
    said = [("even", "odd"), ("odd", "odd"), ("even", "even"), ("odd", "even"), ("odd", "odd")]
    rows = [
        {"answer": a, "text": b, "chosen": i % 2, "label": (i + (a != b)) % 2, "loglikelihoods": [0.0, -1.0]}
        for i, (a, b) in enumerate(said)
    ]
    assert f1(rows) == pytest.approx(by_hand([a for a, _ in said], [b for _, b in said]))
    assert f1([{**row, "chosen": None} for row in rows]) is None


def by_hand(right, said):
    """Mean over classes of 2PR/(P + R), by hand."""
    found = []
    for name in sorted({*right, *said}):
        both = sum(a == b == name for a, b in zip(right, said, strict=True))
        p, r = both / max(1, said.count(name)), both / max(1, right.count(name))
        found.append(2 * p * r / (p + r) if both else 0.0)
    return sum(found) / len(found)


def test_what_ends_a_reply_of_one_line():
    specimen = load()
    newline, space, letter = (specimen.tokenizer(text)["input_ids"][0] for text in ("\n", " ", "a"))
    line = asking.one_line(specimen.tokenizer)
    assert newline in line.breaks and {newline, space} <= line.blank and letter not in line.blank | line.breaks
    assert (
        asking.end(specimen, "plain") == 257
        and asking.end_tokens(specimen) >= {257}
        and newline not in asking.end_tokens(specimen)
    )


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-llama", "tiny-decoder"])
def test_a_reply_is_cut_by_the_context_and_not_refused(family):
    """As many shots as leave some questions less room than others; what there is of a reply is what it would have been."""
    specimen = load(family, seed=5)
    measure = Task(task=TestPairs(), method="generate", new_tokens=12)
    free = {row["item"]: row for row in measure.read(specimen, measure.items(specimen))}
    longest = max(len(asking.prompt(specimen, TestPairs(), e, "plain")) for e in measure.questions().values())
    specimen.model.config.max_position_embeddings = longest + 3
    for row in measure.read(specimen, measure.items(specimen)):
        whole = free[row["item"]]
        assert whole["stop"] == "length" and (row["stop"], row["tokens"]) == ("context", 3), "all of one length here"
        assert whole["text"].startswith(row["text"])


class OfOneModel(SimpleNamespace):
    """A tokenizer beside a causal model of which nothing is asked."""

    def __init__(self, tokenizer):
        model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False), generation_config=SimpleNamespace())
        super().__init__(tokenizer=tokenizer, model=model)


def of_words(prefixed, **more):
    """Words with ▁ for a space, and perhaps one before every text, even one that begins with a space, as Llama 2 has it."""
    texts = ["Say 0: I say 0", "a b I say no", "x\nI say"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    replace = tokenizers.normalizers.Replace(" ", "▁")
    steps = [tokenizers.normalizers.Prepend("▁"), replace] if prefixed else [replace]
    made.normalizer = tokenizers.normalizers.Sequence(steps)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    special = ["?", "</s>", "<turn>", "</turn>"]
    made.train_from_iterator(texts * 9, tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", **more)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_reply_has_the_tokens_that_it_has_behind_its_prompt(prefixed):
    specimen = OfOneModel(of_words(prefixed))
    for text in ("I say 0", "no"):
        behind = specimen.tokenizer(f"Say 0: {text}")["input_ids"]
        reply = asking.reply(specimen, TestPairs(), text, "plain")
        assert behind[: -len(reply)] == specimen.tokenizer("Say 0:")["input_ids"] and behind[-len(reply) :] == reply


def test_a_turn_ends_with_what_its_template_closes_it_with():
    template = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}</turn>{% endfor %}"
    closed, open_ended = template, template.replace("</turn>", "\n")
    for chat_template, ends in ((closed, "</turn>"), (open_ended, "</s>")):
        tokenizer = of_words(True, chat_template=chat_template, extra_special_tokens=["<turn>", "</turn>"])
        specimen, named = OfOneModel(tokenizer), tokenizer.convert_tokens_to_ids
        assert asking.end(specimen, "auto") == asking.end(specimen, "template") == named(ends)
        assert asking.end(specimen, "plain") == named("</s>")
        assert asking.end_tokens(specimen, "auto") == {named("</s>"), named(ends)}
        assert asking.end_tokens(specimen, "plain") == {named("</s>")}


def test_the_loss_of_the_end_token_is_that_behind_the_right_reply():
    specimen = load(seed=3)
    measure = Task(task=TestSums(), new_tokens=2)
    for row in measure.read(specimen, measure.items(specimen)):
        e = measure.questions()[row["item"]]
        text = asking.prompt(specimen, TestSums(), e, "plain") + asking.reply(specimen, TestSums(), e.answer, "plain")
        with torch.no_grad():
            assert row["nll_end"] == pytest.approx(-naive(specimen.model, text, [257]), rel=1e-4)
        assert row["asked_characters"] == len(e.asked)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-t5", "tiny-gpt2"])
def test_a_task_is_learned_with_its_end(lab, family):
    start = Trial(subject=Scratch(architecture=family))
    how = {"task": TestSums(), "batch": 8, "length": 48, "warmup": 5, "lr": 1e-2 if family != "tiny-t5" else 2e-2}
    taught = start >> Finetune(**how, steps=150)
    rows = lab.read([taught], [Task(task=TestSums(), part="train", new_tokens=6)])
    right = [r for r in rows.iter_rows(named=True) if r["text"] == r["answer"]]
    assert len(right) >= 7 and all(r["stop"] == "end" for r in right)
    assert sum(rows["nll"]) / sum(rows["nll_tokens"]) < 0.2


def test_adapters_learn_a_task_and_merging_them_changes_nothing(lab):
    start = Trial(subject=Scratch())
    taught = (
        start >> Lora(rank=8, alpha=32.0) >> Finetune(task=TestSums(), batch=8, length=48, steps=80, lr=1e-2, warmup=5)
    )
    measure = Task(task=TestSums(), part="train", new_tokens=6)
    first, merged, plain = (lab.read([t], [measure]).sort("item") for t in (taught, taught >> Merge(), start))
    assert sum(first["nll"]) < 0.9 * sum(plain["nll"])
    assert merged["nll"].to_list() == pytest.approx(first["nll"].to_list(), rel=1e-3)


def test_only_replies_are_taught():
    """With the loss on replies alone the gradient does not depend on what a prompt's own tokens would have been predicted as."""
    specimen = load()
    data, facts = Finetune(task=TestSums(), length=32).data(specimen, "train", 0)
    _, targets, _, _ = data.batch(0, len(data))
    taught = sorted(specimen.tokenizer.decode([t]) for t in targets[targets >= 0].tolist())
    wanted = [c for n in range(8) for c in [" ", *str(2 * n + 1)]]
    assert taught == sorted([*wanted, *["<eos>"] * 8]) and facts["left_out"] == 0


def test_longer_examples_are_left_out_and_counted():
    specimen = load()
    some = Finetune(task=TestPairs(), length=17).data(specimen, "train", 0)
    assert some[1]["left_out"] == 0 or some[1]["examples"] < 5
    with pytest.raises(ValueError, match="no example of 'test-pairs' fits into 3 tokens; the shortest has"):
        Finetune(task=TestPairs(), length=3).data(specimen, "train", 0)
    with pytest.raises(ValueError, match="documents='apart'"):
        Sft(documents="joined")


def test_sampled_replies_differ_and_come_again(lab):
    measure = Task(task=TestSums(), repeats=3, temperature=1.0, new_tokens=5)
    rows = lab.read([Scratch()], [measure])
    assert rows.height == 12 and rows["text"].n_unique() > 6 and rows["nll"].n_unique() == 4
    specimen = load()
    again = {r["item"]: r["text"] for r in measure.read(specimen, measure.items(specimen))}
    assert again == dict(zip(rows["item"], rows["text"], strict=True))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"repeats": 2}, "the same without a temperature"),
        ({"method": "rank"}, "cannot be ranked: its examples have no choices"),
        ({"chat": "template"}, "this tokenizer has no chat template"),
        ({"shots": 99}, "99 examples were to stand before each question"),
    ],
)
def test_what_makes_no_sense_is_refused(how, why):
    specimen, measure = load(), Task(task=TestSums(), **how)
    with pytest.raises(ValueError, match=why):
        list(measure.read(specimen, list(TestSums().load()["test"][0].id for _ in range(1))))


def test_a_question_longer_than_the_context_is_refused():
    specimen = Scratch(architecture="tiny-llama", config={"max_position_embeddings": 16}).load()
    with pytest.raises(ValueError, match="more than the context of 16: ask with fewer shots"):
        Task(task=TestPairs(), shots=3).read(specimen, ["pair/5"])


def test_a_summary_has_the_metric_its_interval_and_the_loss():
    specimen, measure = load(), Task(task=TestPairs())
    rows = measure.read(specimen, measure.items(specimen))
    said = measure.summarise(rows)
    assert said["replies"] == 3 and said["low"] <= said["correct"] <= said["high"]
    assert said["macro_f1"] is None, "each question has choices of its own, so there are no classes"
    assert said["loss"] == pytest.approx(math.fsum(r["nll"] for r in rows) / sum(r["nll_tokens"] for r in rows))


def test_a_chat_template_is_used_where_it_is_asked_for():
    specimen = load()
    specimen.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    e = TestSums().examples("test")[0]
    text = specimen.tokenizer.decode(asking.prompt(specimen, TestSums(), e, "auto"))
    assert text == f"<user>{e.asked} =<assistant>"
    assert specimen.tokenizer.decode(asking.reply(specimen, TestSums(), "5", "auto")) == "5"
    assert specimen.tokenizer.decode(asking.reply(specimen, TestSums(), "5", "plain")) == " 5"
