"""The study from end to end on tiny models: presets, single layers and heads, the described format, every piece of the report."""

import csv
import json
import statistics
from collections import defaultdict

import pytest

from lesion.studies import Degrade, _outputs
from lesion.study import write_report
from lesion.trial import describe

TINY = {"subject": "tiny-llama", "new_tokens": 10, "prompts": 9, "documents": 3, "tokens": 40, "repeats": 2}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    from lesion import Lab

    lab = Lab(tmp_path_factory.mktemp("degrade") / "lab")
    asked = Degrade(preset="iq", tier="small", **TINY)
    store = lab.take(asked.readings())
    assert not store.index.failures
    answer, page = write_report(store, asked)
    return asked, answer, page, store


def test_presets_are_the_described_runs():
    for name in ("dreams", "iq", "picture"):
        full = Degrade(preset=name)
        assert (full.subject, full.repeats, full.seed, full.new_tokens) == ("google/gemma-3-4b-it", 10, 42, 350)
        assert (full.temperature, full.top_k, full.top_p) == (1.0, 64, 0.95)
        assert full.doses == (1024, 256, 64, 16, 4) and full.battery == name
        small = Degrade(preset=name, tier="small")
        assert small.subject == "smollm2" and small.battery == ("picture-told" if name == "picture" else name)
    assert Degrade(preset="iq", repeats=3, method="ablation").repeats == 3, "what is said counts"
    assert Degrade(preset="iq", method="ablation").doses == (0, 0.2, 0.4, 0.6, 0.8)
    again = Degrade.from_json(json.loads(json.dumps(Degrade(preset="iq", tier="small").to_json())))
    assert again == Degrade(preset="iq", tier="small")


def test_every_piece_of_the_report_is_there(answered):
    _, answer, page, _ = answered
    folder = page.parent
    for table in ("summary", "curves", "generations", "claims", "heat", "effects", "thresholds", "matched-damage"):
        assert (folder / f"tables/{table}.csv").is_file() and (folder / f"tables/{table}.json").is_file(), table
    assert {"answers", "damage", "texts"} <= set(answer.curves["group"])
    with (folder / "tables/claims.csv").open() as file:
        verdicts = {row["verdict"] for row in csv.DictReader(file)}
    assert verdicts <= {"supported", "contradicted", "inconclusive", "not tested"}
    assert "gradually" in page.read_text(encoding="utf-8")


def test_the_described_format_is_valid_and_a_notebook_reads_it(answered):
    asked, _, page, store = answered
    path = page.parent / "outputs/outputs_mult_gauss_tiny-llama_iq.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert len(records) == 3 * 5 * 2 * 9
    import jsonschema

    jsonschema.validate(records, _outputs.schema())  # by somebody else's reading of the schema
    sample = json.loads((path.parent / "samples" / path.name).read_text(encoding="utf-8"))
    assert 100 <= len(sample) <= 200 and {r["level_value"] for r in sample} == {r["level_value"] for r in records}

    # what a notebook of the described study does: group, count, average
    lengths = defaultdict(list)
    for r in records:
        assert r["output"] is not None and not r["output"].startswith(r["prompt_text"])
        lengths[r["param_group_name"], r["std_dev"]].append(r["tokens"])
    assert set(lengths) == {(g, d) for g in ("attn_only", "mlp_only", "embed_only") for d in (0, 0.1, 0.2, 0.4, 0.8)}
    assert all(statistics.mean(found) > 0 for found in lengths.values())
    assert {r["repeat_index"] for r in records} == {0, 1} and {r["seed"] for r in records} == {42, 43}
    assert {r["prompt_id"] for r in records} == set(range(1, 10)) and {r["do_sample"] for r in records} == {True}
    texts = {row["item"]: row["text"] for row in store.rows([asked._cells["mlp", 0.4, 43]["generation"].key])}
    theirs = [
        r["output"] for r in records if (r["param_group_name"], r["level_value"], r["seed"]) == ("mlp_only", 0.4, 43)
    ]
    assert theirs == list(texts.values())


def test_a_record_that_is_not_as_described_is_refused():
    with pytest.raises(ValueError, match="record 0 lacks 'timestamp'"):
        _outputs.validate([{}])


@pytest.mark.parametrize(
    ("each", "site", "want"),
    [
        ("layer", "mlp", ["mlp@0", "mlp@1"]),
        (
            "head",
            "attention.value",
            ["attention.value@0:0", "attention.value@0:1", "attention.value@1:0", "attention.value@1:1"],
        ),
    ],
)
def test_layers_and_heads_one_by_one(lab, each, site, want):
    asked = Degrade(**TINY, site=(site,), each=each, doses=(0, 0.5), measures=("perplexity", "displacement"))
    steps = {describe(s) for r in asked.readings() for s in r.trial.steps}
    assert steps == {f"noise(site={s}, sigma=0.5, seed={seed})" for s in want for seed in (42, 43)}
    store = lab.take(asked.readings())
    answer, _ = write_report(store, asked)
    assert set(answer.summary["site"]) == set(want) and answer.missing == 0


def test_measures_that_were_not_asked_for_are_not_read():
    names = {r.measure.name for r in Degrade(**TINY, measures=("perplexity",)).readings()}
    assert names == {"perplexity"}
    with pytest.raises(ValueError, match="prose is read of texts"):
        Degrade(**TINY, measures=("perplexity", "prose"))
