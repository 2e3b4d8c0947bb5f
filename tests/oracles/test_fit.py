"""The training loop: exact under every split and every interruption, and honest where it stops."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lesion import runs
from lesion.decoder import DecoderConfig, DecoderForCausalLM
from lesion.fit import Stopped, Training, evaluate, fit
from lesion.loss import sum_of_losses
from lesion.optimizers import groups
from lesion.packing import pack
from lesion.trial import Unfinished

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HOW = Training(steps=12, batch=6, length=16, warmup=3, save_every=4, lr=3e-3)
OPTIMIZERS = ["adamw", "adam", "adafactor", "sgd", "sgd-momentum", "signsgd"]


def model(seed=0, dtype=torch.float32, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DecoderForCausalLM(DecoderConfig(**{**SHAPE, **more})).to(dtype)


def data(seed=0, length=16):
    rng = np.random.default_rng(5)
    return pack([np.cumsum(rng.integers(0, 3, rng.integers(5, 40))) % 60 + 1 for _ in range(60)], 0, length, seed)


def weights(m):
    return {name: p.detach().clone() for name, p in m.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Killed(Exception):
    pass


def kill_at(*steps):
    def tell(what, step, **told):
        if step in steps:
            raise Killed

    return tell


@pytest.mark.parametrize("how", [
    HOW, HOW.model_copy(update={"split": 3, "precision": "bfloat16"}),
    *(HOW.model_copy(update={"optimizer": name}) for name in OPTIMIZERS[1:]),
], ids=lambda how: f"{how.optimizer}-{how.precision}")  # fmt: skip
def test_killed_at_any_step_and_continued_it_is_as_if_it_had_not_been(tmp_path, how):
    whole = model()
    facts = fit(whole, data(), how, folder=tmp_path / "whole")
    for at in (1, 4, 5, 9, 11):
        torn, folder = model(), tmp_path / f"torn-{at}"
        with pytest.raises(Killed):
            fit(torn, data(), how, folder=folder, tell=kill_at(at))
        again = model()
        found = fit(again, data(), how, folder=folder)
        assert same(weights(again), weights(whole)), f"killed at {at}"
        assert metrics(folder) == metrics(tmp_path / "whole") and found == facts


def test_it_learns(tmp_path):
    m, held = model(), pack([[1, 2, 3, 4] * 8], 0, 16, 0)
    before = evaluate(m, data(), HOW)
    facts = fit(m, data(), HOW.model_copy(update={"steps": 60, "eval_every": 20}), folder=tmp_path, held_out=held)
    assert evaluate(m, data(), HOW) < before - 0.5
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if "held_out" in row] == [20, 40, 60] and facts["held_out"] == rows[-1][
        "held_out"
    ]
    assert facts["moved"] > 0.99 and facts["trained"] == sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize("split", [2, 3, 4, 6])
def test_any_split_gives_the_same_gradient(tmp_path, split, monkeypatch):
    """Parts differ in scored tokens, so means of means would not do."""
    found = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda params, clip: found.append([p.grad.clone() for p in params]) or torch.tensor(1.0),
    )
    for parts in (1, split):
        fit(model(), data(), HOW.model_copy(update={"steps": 1, "split": parts}), folder=tmp_path / str(parts))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_the_mean_loss_in_float64(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda params, clip: found.extend(p.grad.clone() for p in params) or torch.tensor(1.0),
    )
    fit(model(), data(), HOW.model_copy(update={"steps": 1}), folder=tmp_path)
    exact = model().double()
    ids, targets, mask, at = data().batch(0, 6)
    logits = exact(input_ids=ids, attention_mask=mask, position_ids=at).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for got, p in zip(found, exact.parameters(), strict=True):
        torch.testing.assert_close(got.double(), p.grad, atol=1e-6, rtol=1e-4)


def test_a_signal_saves_and_says_unfinished_and_the_next_run_ends_it(tmp_path):
    whole = model()
    fit(whole, data(), HOW, folder=tmp_path / "whole")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        folder, torn = tmp_path / number.name, model()
        before = signal.getsignal(number)
        with pytest.raises(Unfinished, match="saved after step 6 of 12"):
            fit(
                torn,
                data(),
                HOW,
                folder=folder,
                tell=lambda what, step, n=number, **_: (step == 6 and os.kill(os.getpid(), n)) or time.sleep(0.001),
            )
        assert signal.getsignal(number) == before
        again = model()
        fit(again, data(), HOW, folder=folder)
        assert same(weights(again), weights(whole))


def test_what_is_not_finite_or_jumps_stops_with_the_step_its_rows_and_the_last_good_state(tmp_path):
    ruined = model()

    def ruin(what, step, **_):
        if step == 9:
            with torch.no_grad():
                ruined.lm_head.weight.fill_(math.nan)

    with pytest.raises(Stopped, match=r"at step 10 \(rows 54 to 59\); the last good state is step-00000008"):
        fit(ruined, data(), HOW, folder=tmp_path / "nan", tell=ruin)
    jumping = model()

    def jump(what, step, **_):
        if step == 55:
            with torch.no_grad():
                jumping.lm_head.weight.mul_(40)

    how = HOW.model_copy(update={"steps": 60, "spike": 2.0})
    with pytest.raises(Stopped, match="at step 56"):
        fit(jumping, data(), how, folder=tmp_path / "spike", tell=jump)


def test_another_run_does_not_go_on_in_this_folder(tmp_path):
    fit(model(), data(), HOW, folder=tmp_path)
    for m, d, how in (
        (model(1), data(), HOW),
        (model(), data(seed=0, length=8), HOW),
        (model(), data(), HOW.model_copy(update={"lr": 1e-4})),
    ):
        with pytest.raises(ValueError, match="holds another run"):
            fit(m, d, how, folder=tmp_path)


def test_half_precision_weights_are_trained_in_float32_and_come_back_as_they_were(tmp_path):
    m = model(dtype=torch.bfloat16)
    facts = fit(m, data(), HOW, folder=tmp_path)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16} and 0 < facts["moved"] <= 1


def test_learning_rates():
    how = Training(steps=110, warmup=10, lr=1.0, floor=0.1)
    rates = [how.rate(step) for step in range(110)]
    assert (
        rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        and rates[10] == 1
        and rates[-1] == pytest.approx(0.1)
    )
    assert rates[60] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 50 / 99)) / 2) and rates[10:] == sorted(
        rates[10:], reverse=True
    )
    assert how.model_copy(update={"schedule": "linear"}).rate(60) == pytest.approx(0.1 + 0.9 * (1 - 50 / 99))
    assert how.model_copy(update={"schedule": "constant"}).rate(60) == 1


def test_only_matrices_decay():
    m = model(tie_word_embeddings=True)
    decayed, plain = groups(m, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    tables = {id(m.lm_head.weight), id(m.model.embed_tokens.weight)}
    assert all(p.dim() == 2 and id(p) not in tables for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(m.parameters()))


def test_dropout_is_a_function_of_the_step(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.3)
        )

    whole, torn = gpt2(), gpt2()
    fit(whole, data(), HOW, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        fit(torn, data(), HOW, folder=tmp_path / "torn", tell=kill_at(7))
    again = gpt2()
    torch.rand(17)  # whatever the process did before
    fit(again, data(), HOW, folder=tmp_path / "torn")
    assert same(weights(again), weights(whole))


def test_old_checkpoints_go_and_a_half_written_one_is_not_seen(tmp_path):
    how = HOW.model_copy(update={"steps": 30})
    with pytest.raises(Killed):
        fit(model(), data(), how, folder=tmp_path, tell=kill_at(29))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000024", "step-00000028"]
    (tmp_path / ".step-00000029").mkdir()
    again, whole = model(), model()
    fit(again, data(), how, folder=tmp_path)
    fit(whole, data(), how, folder=tmp_path / "whole")
    assert same(weights(again), weights(whole))


def test_the_loss_of_a_batch_is_the_evaluation_of_it():
    m, d = model(), data()
    with torch.no_grad():
        total = sum(float(sum_of_losses(m, *d.batch(i, 1))) for i in range(len(d)))
    tokens = sum(int((d.batch(i, 1)[1] != -100).sum()) for i in range(len(d)))
    assert evaluate(m, d, HOW) == pytest.approx(total / tokens, rel=1e-6)
    assert runs.KEPT == 2


def test_computing_activations_twice_changes_no_bit(tmp_path):
    plain, twice = model(), model()
    fit(plain, data(), HOW, folder=tmp_path / "plain")
    fit(twice, data(), HOW.model_copy(update={"recompute": True}), folder=tmp_path / "twice")
    assert same(weights(plain), weights(twice)) and not twice.is_activation_checkpointing


def test_experts_are_trained_with_their_own_losses_and_drops_are_told(tmp_path):
    shape = {"experts": 4, "experts_per_token": 2, "capacity_factor": 0.5}
    fit(model(**shape), data(), HOW, folder=tmp_path / "with")
    rows = metrics(tmp_path / "with")
    assert all(0.3 < row["dropped"] < 0.7 and row["busiest"] >= 1 for row in rows), "half the room is there"
    free = fit(model(**{**shape, "capacity_factor": None}), data(), HOW, folder=tmp_path / "free")
    assert all(row["dropped"] == 0 for row in metrics(tmp_path / "free")) and free["loss"] < 4.2
    heavy = {**shape, "balance_weight": 20.0, "capacity_factor": None}
    fit(model(**heavy), data(), HOW, folder=tmp_path / "heavy")
    first = [metrics(tmp_path / name)[0] for name in ("heavy", "free")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"]), "the loss that is told is that of the text alone"
    assert first[0]["norm"] > 1.2 * first[1]["norm"], "and the gradient is not"


@pytest.mark.filterwarnings("ignore")  # the compiler looks at everything, and warns of what nobody reads
def test_compiled_layers_compute_the_same_and_are_gone_on_with_to_the_same_bits(tmp_path):
    """One test for all of it, since each process compiles for half a minute."""
    shutil.which("g++") or pytest.skip("no C++ compiler")
    how = HOW.model_copy(
        update={"compile": True, "precision": "bfloat16", "steps": 6, "save_every": 2, "documents": "joined"}
    )
    joined = replace(data(), documents="joined")
    whole, torn, plain = model(), model(), model()
    fit(whole, joined, how, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        fit(torn, joined, how, folder=tmp_path / "torn", tell=kill_at(3))
    again = model()
    fit(again, joined, how, folder=tmp_path / "torn")
    assert same(weights(again), weights(whole)) and metrics(tmp_path / "torn") == metrics(tmp_path / "whole")
    fit(plain, joined, how.model_copy(update={"compile": False}), folder=tmp_path / "plain")
    told = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "plain")]
    assert told[0] == pytest.approx(told[1], rel=3e-3)
    assert all(m._compiled_call_impl is None for m in whole.modules())
