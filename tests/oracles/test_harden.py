"""Adversarial training: its gradients, what it changes of a batch, its resumption, and that it hardens."""

import json

import numpy as np
import pytest
import torch

from lesion.bench import Bench
from lesion.fit import fit
from lesion.hardening import attacked_rows, harden, row_gradients
from lesion.loss import IGNORE, sum_of_losses
from lesion.measures import Hotflip
from lesion.ranks import Alone
from lesion.steps import Harden, Heal
from lesion.subjects import Scratch
from lesion.texts import corpus
from lesion.texttraining import packed
from oracles import test_ranks as ranks
from oracles.test_fit import HOW as FIT
from oracles.test_fit import data, model

HOW = Harden(steps=8, batch=4, length=24, warmup=2, lr=5e-3, skip=20, save_every=3, flips=3, share=0.5).pin()


def batch_of(specimen, how=HOW, step=0):
    data = packed(specimen, corpus(how.corpus)[how.skip :], how)
    return list(data.batch(step * how.batch, how.batch))


def weights(specimen):
    return {name: p.detach().clone() for name, p in specimen.model.named_parameters()}


@pytest.mark.parametrize("documents", ["apart", "joined"])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gemma3-text"])
def test_the_gradient_is_that_of_the_looked_up_row_in_float64(family, documents):
    here = Scratch(architecture=family).load()
    here.model.train()  # dropout must not count
    model, batch = here.model, batch_of(here, HOW.model_copy(update={"documents": documents}))
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    found = row_gradients(model, batch, autocast=False)
    assert model.training and not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    exact = Scratch(architecture=family).load().model.double().eval()
    table, ids, targets, mask, at = exact.get_input_embeddings().weight.detach(), *batch
    rows = table[ids].clone().requires_grad_()
    scale = getattr(exact.get_input_embeddings(), "embed_scale", torch.tensor(1.0)).double()
    if mask is None:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
    out = exact(inputs_embeds=rows * scale, attention_mask=mask, position_ids=at, use_cache=False)
    torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found.double(), rows.grad, atol=1e-4, rtol=1e-3)


def test_a_batch_is_changed_in_the_rows_of_its_step_and_their_loss_rises():
    here = Scratch().load()
    Heal(steps=40, batch=4, length=24, warmup=2, lr=1e-2, skip=20).pin().apply(
        here
    )  # so that there is something to break
    perturb, before = HOW.guidance(here)["perturb"], weights(here)
    special, raised = set(here.tokenizer.all_special_ids), []
    for step in range(6):
        clean = batch_of(here, step=step)
        kept = [x if x is None else x.clone() for x in clean]
        ids, targets, mask, at = perturb(Alone(here.model), step, clean)
        for x, y in zip(clean, kept, strict=True):
            assert x is y is None or torch.equal(x, y)
        assert torch.equal(mask, clean[2]) and torch.equal(at, clean[3])
        moved = ids != clean[0]
        chosen = attacked_rows(HOW.seed, step, 4, 0.5)
        assert [row for row in range(4) if moved[row].any()] == chosen and int(moved.sum(1).max()) <= HOW.flips
        assert not set(ids[moved].tolist()) & special and not set(clean[0][moved].tolist()) & special
        unscored = torch.zeros_like(moved)
        unscored[:, :-1] = moved[:, 1:]
        assert torch.equal(targets, clean[1].masked_fill(unscored, IGNORE))
        with torch.no_grad():
            lost = [float(sum_of_losses(here.model.eval(), x, targets, mask, at)) for x in (clean[0], ids)]
        raised.append(lost[1] - lost[0])
    assert all(rise > 0 for rise in raised), raised
    assert all(torch.equal(before[name], w) for name, w in weights(here).items())


@pytest.mark.parametrize("part", [1, 2, 3])
def test_rows_attacked_together_or_apart_are_the_same(part):
    here = Scratch().load()
    batch, may = batch_of(here), torch.ones(260, dtype=torch.bool)
    whole = harden(Alone(here.model), batch, [0, 1, 3], 3, may, False, 3)
    parts = harden(Alone(here.model), batch, [0, 1, 3], 3, may, False, part)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize(("family", "more"), [
    ("tiny-llama", {}), ("tiny-llama", {"split": 2, "precision": "bfloat16"}), ("tiny-gpt2", {}),
    ("tiny-decoder", {"recompute": True}),
], ids=str)  # fmt: skip
def test_killed_at_any_step_and_continued_it_is_as_if_it_had_not_been(tmp_path, family, more):
    """GPT-2 has dropout, whose draws the attack must not move."""
    how = HOW.model_copy(update=more)
    whole = Scratch(architecture=family).load()
    whole.place = tmp_path / "whole"
    facts = how.apply(whole)
    for at in (1, 4, 7):
        torn = Scratch(architecture=family).load()
        torn.place = tmp_path / f"torn-{at}"

        def tell(what, step, at=at, **told):
            if step == at:
                raise Killed

        torn.tell = tell
        with pytest.raises(Killed):
            how.apply(torn)
        again = Scratch(architecture=family).load()
        again.place = torn.place
        assert how.apply(again) == facts
        assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(again).items()), f"killed at {at}"


def test_the_loss_of_a_step_is_a_mean_over_what_is_scored(tmp_path):
    here, twin = Scratch().load(), Scratch().load()
    here.place = tmp_path
    HOW.apply(here)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    ids, targets, mask, at = HOW.guidance(twin)["perturb"](Alone(twin.model), 0, batch_of(twin))
    tokens = int((targets != IGNORE).sum())
    with torch.no_grad():
        want = float(sum_of_losses(twin.model, ids, targets, mask, at)) / tokens
    assert first["tokens"] == tokens < int((batch_of(twin)[1] != IGNORE).sum())
    assert first["loss"] == pytest.approx(want, rel=1e-6)


PERTURB = """
from lesion.hardening import attacked_rows, harden
may = torch.ones(64, dtype=torch.bool)
def perturb(team, step, batch):
    return harden(team, batch, attacked_rows(0, step, len(batch[0]), 0.5), 2, may, False, 3)
"""


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shares"])
def test_two_processes_harden_as_one_and_shares_of_the_weights_are_refused(tmp_path, monkeypatch, sharded):
    script = ranks.SCRIPT.replace("def tell", PERTURB + "def tell").replace("tell=tell", "tell=tell, perturb=perturb")
    monkeypatch.setattr(ranks, "SCRIPT", script)
    assert ranks.together({tmp_path / "two": FIT}, sharded=sharded) == [0, 0]
    if sharded:
        assert "train on copies (DDP)" in (tmp_path / "two" / "refused-1").read_text()
        return
    here: dict = {}
    exec("import torch" + PERTURB, here)  # the same lines as there
    fit(model(), data(), FIT, folder=tmp_path / "one", held_out=data(1), perturb=here["perturb"])
    for a, b in zip(ranks.losses(tmp_path / "one"), ranks.losses(tmp_path / "two"), strict=True):
        assert a is b is None or b == pytest.approx(a, abs=1e-5)
    fit(model(), data(), FIT, folder=tmp_path / "clean", held_out=data(1))
    assert ranks.losses(tmp_path / "clean")[0] != ranks.losses(tmp_path / "one")[0]


def test_what_hardens_nothing_is_refused():
    with pytest.raises(ValueError, match="24 flips leave no token of a row of 24 as it was"):
        Harden(length=24, flips=24)
    few = Harden(batch=4, share=0.1)
    with pytest.raises(ValueError, match=r"a share of 0\.1 of 4 rows is no row"):
        few.guidance(Scratch().load())
    Bench(here := Scratch(architecture="tiny-t5").load())
    with pytest.raises(ValueError, match="encoder-decoder"):
        HOW.apply(here)


def test_a_hardened_model_is_harder_to_attack_than_one_trained_alike_and_than_one_of_equal_clean_loss(tmp_path):
    """Documents learned by heart: the first half tells the second, until a few letters are flipped."""
    rng = np.random.default_rng(0)
    file = tmp_path / "by-heart.jsonl"
    texts = ["".join("abcdefghijklmnop"[k] for k in rng.integers(16, size=24)) for _ in range(9)]
    file.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    how = {
        "corpus": str(file), "skip": 0, "batch": 16, "length": 25, "lr": 5e-3, "warmup": 20, "weight_decay": 0.0,
    }  # fmt: skip
    attack = Hotflip(corpus=str(file), documents=8, prompt=12, target=12, flips=2, candidates=24, each=2).pin()
    found = {}
    for name, step in {
        "hard": Harden(**how, steps=200, share=0.5, flips=3),
        "alike": Heal(**how, steps=200),
        "equal": Heal(**how, steps=90),
    }.items():
        here = Scratch().load()
        step.pin().apply(here)
        rows = attack.read(here, attack.items(here))
        found[name] = attack.summarise(rows) | {"curves": [row["losses"] for row in rows]}
    from lesion.flipping import success

    share = {name: sum(success(c, 2, 3.0, relative=False) for c in told["curves"]) / 8 for name, told in found.items()}
    assert found["hard"]["increase"] < 0.5 * found["alike"]["increase"], found
    assert share["hard"] <= 0.25 and share["alike"] >= 0.75, share
    assert found["equal"]["loss"] == pytest.approx(
        found["hard"]["loss"], abs=0.6
    )  # rounding decides where each training ends
    assert found["hard"]["increase"] < 0.8 * found["equal"]["increase"] and share["hard"] < share["equal"]
