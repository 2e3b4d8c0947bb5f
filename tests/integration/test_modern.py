"""The studies of our own decoder, from the command line to the page, at the size of a smoke test."""

import json
import math
import shutil

import polars as pl
import pytest

from lesion.cli import run
from lesion.studies import _lm as lm
from lesion.studies.modern_lm import PRESETS, ModernLm
from lesion.studies.modern_sinks import ModernSinks

QUIET = ["--verbosity", "quiet"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    lab = tmp_path_factory.mktemp("modern") / "lab"
    assert run(["run", "modern-lm", "--tier", "smoke", "--lab", str(lab), *QUIET]) == 0
    return lab


def test_modern_lm_says_how_far_it_is_from_counting(kept):
    (folder,) = (kept / "studies").glob("modern-lm-*")
    summary = pl.read_json(folder / "tables" / "summary.json")
    assert summary["way"].to_list() == ["model", "trigram", "5-gram"] and summary["tokens"].n_unique() == 1
    claims = pl.read_json(folder / "tables" / "claims.json")
    bits = dict(zip(summary["way"], summary["bits a byte"], strict=True))
    assert claims["effect"][0] == pytest.approx(bits["trigram"] - bits["model"], abs=0.05)
    curves = pl.read_json(folder / "tables" / "curves.json")
    assert curves["dose"].to_list() == list(range(1, 11)) and curves["value"][-1] < curves["value"][0]
    page = (folder / "report.html").read_text()
    assert "By step" in page and "Attention" in page and list((folder / "figures").glob("attention*.png"))
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 2 and {"asked", "text", "written"} <= samples[0].keys()
    assert (folder / "evaluation.csv").read_text().startswith("way,")


def test_kept_states_are_evaluated_and_sampled_without_training(kept, capsys):
    (state,) = (path for path in (kept / "states").iterdir() if not path.name.startswith("."))
    before = (state / "model.safetensors").stat().st_mtime_ns
    command = ["run", "evaluate", "--tier", "smoke", "--states", str(state), "--subjects", "tiny-llama"]
    assert run([*command, "--lab", str(kept), *QUIET]) == 0
    assert (state / "model.safetensors").stat().st_mtime_ns == before
    (folder,) = (kept / "studies").glob("evaluate-*")
    table = pl.read_csv(folder / "losses.csv")
    assert table["model"][0].startswith(state.name[:8]) and table["bits a byte"][0] < table["bits a byte"][1]
    assert len(json.loads((folder / "samples.json").read_text())) == 8
    capsys.readouterr()
    assert run([*command, "--lab", str(kept.parent / "other"), *QUIET]) == 2
    assert "is not kept in the lab" in capsys.readouterr().err
    moved = shutil.copytree(state, kept.parent / "moved")
    for wrong, why in ((moved, "renamed or edited"), (kept / "log", "no kept state")):
        assert run(["run", "evaluate", "--states", str(wrong), "--lab", str(kept)]) == 2
        assert why in capsys.readouterr().err
    assert run(["run", "evaluate", "--lab", str(kept)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err


def test_modern_sinks_reads_every_way_of_attending_at_every_context(tmp_path):
    lab = tmp_path / "lab"
    assert run(["run", "modern-sinks", "--tier", "smoke", "--lab", str(lab), *QUIET]) == 0
    (folder,) = (lab / "studies").glob("modern-sinks-*")
    curves = pl.read_json(folder / "tables" / "curves.json").filter(pl.col("measure") == "perplexity")
    ways = {"full attention", "window", "window + first tokens", "read afresh", "learned sink tokens"}
    assert ways < set(curves["site"]) and set(curves["dose"]) == {1, 2, 4, 8, 16}
    assert curves.select("value", "low", "high").null_count().sum_horizontal()[0] == 0
    near = curves.filter((pl.col("dose") == 1) & pl.col("site").is_in(["full attention", "window", "read afresh"]))
    assert near["value"].max() == pytest.approx(near["value"].min(), rel=1e-5), "nothing is beyond the window yet"
    claims = pl.read_json(folder / "tables" / "claims.json")
    assert len(claims) == 9 and claims["verdict"].is_in(["supported", "contradicted", "inconclusive"]).all()
    texts = pl.read_json(folder / "tables" / "generations.json")
    assert len(texts) == 6 * 5 * 2 and (folder / "figures" / "perplexity.svg").is_file()
    assert "context, in training lengths" in (folder / "report.html").read_text()


def test_the_configurations_for_cards_fit_on_them():
    """Weights, gradients and AdamW's two states in float32; activations of one piece in bfloat16, layers computed twice."""
    import torch

    from lesion.decoder import DecoderConfig, DecoderForCausalLM
    from lesion.loss import CHUNK_BYTES
    from lesion.studies._decoders import shape

    for preset, card in (("rtx3060", 12), ("card-12gb", 12), ("card-24gb", 24)):
        study = ModernLm(preset=preset)
        given = shape(study.size)
        with torch.device("meta"):
            model = DecoderForCausalLM(DecoderConfig(**given, vocab_size=study.vocabulary))
        count = sum(p.numel() for p in model.parameters())
        tokens = study.batch // study.split * study.length
        assert study.recompute and study.batch % study.split == 0
        inputs = given["num_hidden_layers"] * tokens * given["hidden_size"] * 4
        layer = tokens * (14 * given["hidden_size"] + 4 * given["intermediate_size"]) * 4
        total = 16 * count + 2 * count + inputs + layer + 3 * CHUNK_BYTES + 1.2e9  # the last for the driver
        assert 0.4 < total / (card * 2**30) < 0.95, (preset, total / 2**30)
    assert set(PRESETS) == {"none", "rtx3060", "card-12gb", "card-24gb"}


@pytest.mark.parametrize(
    ("study", "wrong", "why"),
    [
        (ModernLm, {"size": "7b"}, "no size '7b'; there are: smoke, small, tiny, 1m"),
        (ModernLm, {"subject": "tiny", "repeats": 2}, "is not trained again"),
        (ModernSinks, {"length": 8, "sinks": 8}, "no room beside 8 sinks"),
        (ModernSinks, {"tier": "huge"}, "tier"),
    ],
)
def test_impossible_options_are_refused(study, wrong, why):
    with pytest.raises(ValueError, match=why):
        study(**wrong)


@pytest.mark.parametrize("study", ["modern-lm", "modern-sinks", "resilience", "immunity", "monotone", "prion-healing"])
@pytest.mark.parametrize("renamed", [False, True])
def test_what_is_trained_on_is_not_called_held_out_under_any_name(tmp_path, capsys, study, renamed):
    one, other = tmp_path / "one.txt", tmp_path / ("other.txt" if renamed else "one.txt")
    for path in (one, other):
        path.write_text("CHAPTER I\n\nShe was not at home, and he went away again.\n" * 40, encoding="utf-8")
    trained = "--text" if study.startswith("prion") else "--corpus"
    wrong = [
        "run",
        study,
        "--tier",
        "smoke",
        trained,
        str(one),
        "--held-out",
        str(other),
        "--lab",
        str(tmp_path / "lab"),
    ]
    said = "kept, and more are read" if study == "monotone" and not renamed else "held_out must be two corpora"
    assert run(wrong) == 2
    assert said in capsys.readouterr().err and not list((tmp_path / "lab").glob("log/*"))


def test_documents_are_paired_by_name_and_one_without_a_number_is_left_out():
    def read(way, order):
        found = {
            f"d{i}": {"nll": 100.0 + i + (9 if way != "model" else 0), "bytes": 50 + i, "tokens": 20} for i in order
        }
        return found | ({"d3": {**found["d3"], "nll": None}} if way == "model" else {})

    cells = {0: {way: read(way, range(8) if way == "model" else range(7, -1, -1)) for way in lm.WAYS}}
    for row in lm.claims(cells).to_dicts():
        expected = sum(9 / math.log(2) / (50 + i) for i in range(8) if i != 3) / 7
        assert row["items"] == 7 and row["verdict"] == "supported" and row["effect"] == pytest.approx(expected)
    (mine, *_) = lm.summary(cells).to_dicts()
    assert mine["tokens"] == 140
    assert mine["bits a byte"] == pytest.approx(
        sum((100 + i) / math.log(2) for i in range(8) if i != 3) / sum(50 + i for i in range(8) if i != 3)
    )


def test_a_corpus_may_have_any_sign_in_its_name():
    study = ModernSinks(tier="smoke")
    (name, seed), readings = next(iter(study._cells.items()))
    measure, reading = next(iter(readings.items()))
    found = study._sweep({reading.key: {"hub:org/name@v1:texts/*.txt/000@2": {"nll": 1.0}}})
    assert found.rows[name, 2.0, seed][measure] == {"hub:org/name@v1:texts/*.txt/000": {"nll": 1.0}}
