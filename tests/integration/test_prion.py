"""The five studies of poison, from the command line to their files, at the size of a smoke test, in one lab."""

import csv
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError

from lesion.claiming import decided
from lesion.cli import run
from lesion.store import Store
from lesion.studies import _prion_say as say
from lesion.studies._prion import Runs
from lesion.studies.prion_healing import PrionHealing
from lesion.studies.prion_mechanism import PrionMechanism
from lesion.studies.prion_placebo import PrionPlacebo
from lesion.studies.prion_scaling import PrionScaling
from lesion.studies.prion_shield import PrionShield

STUDIES = {
    "placebo": (PrionPlacebo, "placebo", "placebo_comparison"),
    "scaling": (PrionScaling, "scaling_law", "scaling_law_curve"),
    "mechanism": (PrionMechanism, "mechanism", "mechanism_comparison"),
    "shield": (PrionShield, "shield", "shield_matrix"),
    "healing": (PrionHealing, "healing", "healing_comparison"),
}
FILTER = ["--filter-method", "iqr", "--filter-metric", "rank"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = tmp_path_factory.mktemp("prion") / "lab"
    for name in STUDIES:
        line = ["run", f"prion-{name}", "--tier", "smoke", "--lab", str(lab), "--verbosity", "quiet"]
        assert run([*line, *(FILTER if name == "shield" else [])]) == 0
    return lab


def folder(lab, name):
    (found,) = (lab / "studies").glob(f"prion-{name}-*")
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_the_described_files_are_there_and_agree(lab, name):
    kind, summary, figure = STUDIES[name]
    where = folder(lab, name)
    told = json.loads((where / f"{summary}_summary.json").read_text())
    rows = list(csv.DictReader(io.StringIO((where / f"{summary}_summary.csv").read_text())))
    assert len(rows) == len(told["summary"]) and (where / f"{figure}.png").stat().st_size > 5000
    runs = sorted((where / "raw_data").glob("*_run*"))
    asked = kind(tier="smoke", **({"filter_method": "iqr", "filter_metric": "rank"} if name == "shield" else {}))
    assert len(runs) == len(asked._runs.trials) and asked.seeds == range(43, 46)
    for path in runs:
        config = json.loads((path / "config.json").read_text())
        assert config["seed"] in asked.seeds and config["trial"]["steps"] and config["result"]["rank"] is not None
        if config["trial"]["steps"][-1]["is"] != "step/precision":
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and "loss" in lines[0]
    for path in (where / "raw_data").glob("aggregate_summary_*.csv"):
        assert len(list(csv.DictReader(io.StringIO(path.read_text())))) == 3
    assert (where / "report.html").stat().st_size > 20_000


def test_every_claim_has_a_verdict_and_every_described_one_is_answered(lab):
    for name in STUDIES:
        claims = pl.read_json(folder(lab, name) / "tables" / "claims.json")
        assert len(claims) >= 5 and claims["verdict"].null_count() == 0
        table = pl.read_json(folder(lab, name) / "tables" / "described-and-found.json")
        assert len(table) and {"published, signed", "ours", "verdict"} <= set(table.columns)


def test_a_number_of_the_table_can_be_computed_again_from_rows(lab):
    asked, store = PrionPlacebo(tier="smoke"), Store(lab)
    runs = asked._runs.know(asked.rows(store), store)
    key = ("tiny-gpt-neox", "gaussian", 44)
    trial, before = runs.trials[key], runs.before[key[:2]]
    ranks = []
    for some in (before, trial):
        rows = runs.read(some, "spectrum").values()
        ranks.append(sum(row["effective_rank"] for row in rows) / len(rows))
    assert runs.run(key)["rank"] == pytest.approx(100 * (ranks[1] / ranks[0] - 1))
    told = json.loads((folder(lab, "placebo") / "placebo_summary.json").read_text())
    [row] = [row for row in told["summary"] if row["arm"] == "gaussian"]
    values = [runs.run(("tiny-gpt-neox", "gaussian", seed))["rank"] for seed in asked.seeds]
    assert row["rank"] == pytest.approx(sum(values) / 3) and row["runs"] == 3


def test_outliers_are_left_out_of_a_second_analysis_and_both_are_printed(lab):
    told = json.loads((folder(lab, "shield") / "shield_summary.json").read_text())
    found = told["statistics"]["tiny-gpt-neox"]["filter"]
    assert found["method"] == "iqr" and found["metric"] == "rank" and "anova" in found["unfiltered"]
    assert sum(found["kept"].values()) + sum(found["dropped"].values()) == 21
    plain = json.loads((folder(lab, "mechanism") / "mechanism_summary.json").read_text())
    assert len(plain["statistics"]["tiny-gpt-neox"]["all runs"]["pairwise, unpaired"]) == 36


def test_arms_that_are_one_sentence_in_two_studies_are_made_once(lab):
    here = PrionPlacebo(tier="smoke")._runs.trials["tiny-gpt-neox", "eigen-prion", 43].key
    assert here == PrionMechanism(tier="smoke")._runs.trials["tiny-gpt-neox", "adamw", 43].key
    assert here == PrionHealing(tier="smoke")._runs.trials["tiny-gpt-neox", "poisoned", 43].key
    assert here == PrionShield(tier="smoke")._runs.trials["tiny-gpt-neox", "float32 full", 43].key


def test_what_makes_no_sense_is_refused():
    for kind, options, said in (
        (PrionPlacebo, {"arms": ("pile", "eigen-prion")}, "no arm 'pile'; there are: eigen-prion, loss-ascent"),
        (PrionPlacebo, {"arms": ("gaussian", "shuffled")}, "which is not among the arms"),
        (PrionMechanism, {"optimizers": ("adamw", "lion")}, "no optimizer 'lion' here"),
        (PrionMechanism, {"optimizers": ("adamw", "adam")}, "one of them is not among the optimizers"),
        (PrionShield, {"arms": ("fp4", "nf4 lora")}, "no arm 'fp4'"),
    ):
        with pytest.raises(ValidationError, match=said):
            kind(**options)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--length", "300"], "300 tokens of poison are longer than the context of scratch, 256"),
        (["--site", "mpl"], "no site 'mpl'"),
        (["--site", "attention.value"], "is a part of"),
        (["--directions", "99999999"], "directions were asked for"),
        (["--text", "austen"], "text and held_out must be two corpora"),
        (["--documents", "99"], "has 24 documents, and 99 are to be read"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(tmp_path, capsys, option, said):
    assert run(["run", "prion-placebo", "--tier", "smoke", *option, "--lab", str(tmp_path / "lab")]) == 2
    assert said in capsys.readouterr().err and not list((tmp_path / "lab").glob("log/*"))


def test_models_stored_in_sixteen_bits_are_held_in_float32(tmp_path):
    from lesion.subjects import Scratch

    specimen = Scratch(architecture="tiny-gpt-neox", dtype="float16").load()
    specimen.model.save_pretrained(tmp_path / "m")
    specimen.tokenizer.save_pretrained(tmp_path / "m")
    asked = PrionPlacebo(tier="smoke", subject=str(tmp_path / "m"))
    assert asked.start(asked.subject).subject.dtype == "float32"
    assert asked.start(asked.subject).subject.load().model.dtype == torch.float32


def test_fewer_than_three_runs_are_no_test(tmp_path, capsys):
    line = ["run", "prion-mechanism", "--tier", "smoke", "--runs", "1", "--optimizers", "adamw", "sgd"]
    assert run([*line, "--lab", str(tmp_path / "lab"), "--verbosity", "quiet"]) == 0
    where = folder(tmp_path / "lab", "mechanism")
    told = json.loads((where / "mechanism_summary.json").read_text())
    assert "a test needs two groups of three runs or more" in told["statistics"]["tiny-gpt-neox"]["not tested"]
    assert {row["verdict"] for row in told["claims"]} == {"not tested"}


def test_described_settings_are_those_that_were_described():
    asked = PrionScaling(preset="described")
    assert asked.sizes[0] == "EleutherAI/pythia-70m" and asked.runs == 10 and asked.seeds[0] == 43
    assert (asked.lr, asked.large_lr, asked.steps, asked.length) == (1e-4, 2e-4, 100, 64)
    assert (asked.directions, asked.large_directions, asked.objective) == (10, 3, "described")
    assert PrionPlacebo(preset="described").runs == PrionMechanism(preset="described").runs == 3


class Invented:
    """Runs whose numbers are given: arm → name → values."""

    def __init__(self, margin=0.0, **arms):
        self.margin, self.given = margin, arms

    def array(self, subject, arm, name):
        return np.array([[math.nan if v is None else v for v in self.given[arm][name]]], float)

    def seeds(self, subject, arm):
        return range(len(next(iter(self.given[arm].values()))))

    def run(self, key):
        return {"ended": None, **{name: values[key[2]] for name, values in self.given[key[1]].items()}}


def spread(mean, n=10):
    return [mean + 0.1 * math.sin(3 * i) for i in range(n)]


def test_more_than_another_means_nothing_where_there_is_nothing():
    """Both ranks rise, one less than the other: that is no support for 'lowers the rank more'."""
    runs = Invented(a={"rank": spread(2.0)}, b={"rank": spread(5.0)})
    plain = decided([say.less(runs, "m", "a", "b", "a lowers the rank more than b")])
    given = decided([say.less(runs, "m", "a", "b", "a lowers the rank more than b", given=("a", "rank", -1))])
    assert plain["verdict"][0] == "supported" and given["verdict"][0] == "not tested"
    assert "the rank of a did not fall: +2" in given["note"][0]
    falls = Invented(a={"rank": spread(-5.0)}, b={"rank": spread(-2.0)})
    found = decided([say.less(falls, "m", "a", "b", "a lowers the rank more than b", given=("a", "rank", -1))])
    assert found["verdict"][0] == "supported" and found["effect"][0] == pytest.approx(-3)
    unsure = Invented(a={"rank": [-1, 1, -2, 1.5, -0.6, 0.4, -1, 0.8, -0.7, 0.3]}, b={"rank": spread(5.0)})
    found = decided([say.less(unsure, "m", "a", "b", "a lowers the rank more than b", given=("a", "rank", -1))])
    assert found["verdict"][0] == "inconclusive" and found["p"][0] > 0.05, "the larger p of both"


def test_runs_that_cannot_be_read_forbid_support_and_fewer_than_three_are_no_test():
    lost = Invented(a={"rank": [*spread(-5.0, 9), None]})
    found = decided([say.falls(lost, "m", "a")])
    assert found["verdict"][0] == "inconclusive" and "1 of 10 runs have no number" in found["note"][0]
    two = Invented(a={"rank": [0.01, 0.02]})
    for row, least in ((say.falls(two, "m", "a"), 6), (say.nothing(two, "m", "a", 1.0), 3)):
        assert row["verdict"] == "not tested" and f"needs {least} runs, and here are 2" in row["note"]


def test_what_goes_the_other_way_is_refuted_whether_the_first_fell_or_not():
    for mean in (2.0, -0.05):
        runs = Invented(a={"rank": spread(mean)}, b={"rank": spread(-5.0)})
        found = decided([say.less(runs, "m", "a", "b", "a lowers the rank more than b", given=("a", "rank", -1))])
        assert found["verdict"][0] == "contradicted"


@pytest.mark.parametrize(
    ("sick", "mended", "said"), [(2, 0.1, "supported"), (-2, 0.1, "supported"), (2, 4, "contradicted")]
)
def test_healing_brings_a_rank_nearer_from_whichever_side(sick, mended, said):
    asked = PrionHealing(tier="smoke", runs=10)
    arms = {"poisoned": spread(sick)}
    for rate in asked.rates:
        arms |= {f"poisoned, healed at {rate:g}": spread(mended), f"undamaged, healed at {rate:g}": spread(0.0)}
    runs = Invented(**{arm: {"rank": v, "described rank": v, "loss": spread(0.1)} for arm, v in arms.items()})
    runs.arms = lambda subject: list(arms)
    found = decided(asked._claims(runs)).filter(pl.col("claim").str.contains("nearer"))
    assert found["verdict"].to_list() == [said] * len(asked.rates)


def test_a_change_within_the_margin_is_no_collapse_and_nothing_at_once():
    runs = Invented(a={"rank": spread(-0.3)}, margin=1.0)
    found = decided([say.falls(runs, "m", "a"), say.nothing(runs, "m", "a", 1.0)])
    assert found["verdict"].to_list()[0] != "supported" and found["verdict"].to_list()[1] == "supported"
    assert decided([say.falls(Invented(a={"rank": spread(-3.0)}, margin=1.0), "m", "a")])["verdict"][0] == "supported"


def test_a_slope_is_no_collapse_where_no_rank_falls():
    row = {
        "claim": "more",
        "effect": -3.3,
        "low": -4.0,
        "high": -2.0,
        "unit": "%",
        "p": 0.01,
        "power": None,
        "direction": -1,
    }
    rising, falling = (Invented(**{"eigen-prion": {"rank": spread(mean)}}) for mean in (2.0, -2.0))
    assert say.taking(rising, "m", row, ("eigen-prion", "rank", -1))["verdict"] == "not tested"
    assert decided([say.taking(falling, "m", row, ("eigen-prion", "rank", -1))])["verdict"][0] == "supported"


def test_equivalence_is_decided_after_the_correction():
    near = Invented(a={"rank": [0.62 + 0.55 * math.sin(3 * i) for i in range(10)]})
    row = say.nothing(near, "m", "a", 1.0)
    assert row["verdict"] == "supported" and 0.005 < row["p"] < 0.05
    many = [{**say.falls(Invented(b={"rank": spread(0.0)}), "m", "b"), "p": 0.5} for _ in range(20)]
    assert decided([row, *many])["verdict"][0] == "inconclusive"


def test_a_layer_that_is_zero_has_rank_zero_and_one_that_is_not_finite_leaves_no_mean():
    row = {"outcome": "read", "effective_rank": 10.0, "described": 3.0, "participation_ratio": 4.0, "layer": 0}
    runs = Runs()
    for other, mean in (("zero", 5.0), ("not finite", None), ("read", 10.0)):
        lost = {**row, "layer": 1, "outcome": other}
        lost |= {} if other == "read" else dict.fromkeys(("effective_rank", "described", "participation_ratio"))
        runs.read = lambda trial, name, rows=(row, lost): dict(enumerate(rows))
        assert runs.ranks(None)["rank"] == mean


def test_displacements_that_differ_are_not_called_equal():
    asked = PrionMechanism(tier="smoke")
    for displacements, ended, why in (
        ((0.02, 0.0201), "displacement", None),
        ((0.02, 0.0215), "displacement", "farther apart than 5%"),
        ((0.02, 0.02), None, "did not come as far as 0.02"),
    ):
        found = dict(zip(("adamw matched", "sgd matched"), displacements, strict=True))
        runs = SimpleNamespace(run=lambda key, f=found, e=ended: {"arm": key[1], "ended": e, "displacement": f[key[1]]})
        said = asked._unequal(runs)
        assert (said is None) if why is None else why in said
