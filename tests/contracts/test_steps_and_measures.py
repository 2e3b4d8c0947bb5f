"""Contracts that hold for every step and measure there is. A new one joins by being in EXAMPLES, which a test enforces."""

import importlib
import itertools
import math

import polars as pl
import pytest
import torch

from benchmarkdocs import invented
from lesion import harness, measures, packaged, steps
from lesion.bench import Bench
from lesion.digest import combined, digests
from lesion.judging import RUBRICS
from lesion.lab import product
from lesion.spec import Spec, find, words
from lesion.store import Store
from lesion.subjects import Scratch
from lesion.trial import Measure, Reading, Step, Trial
from words import TestPairs, TestSums

HOTFLIP = {"documents": 2, "prompt": 12, "target": 6, "flips": 2, "candidates": 6, "each": 2, "draws": 2}
SITES = ["attention.value", "attention", "mlp", "embedding", "head", "all", "mlp+embedding"]
HEALTHY = Trial(subject=Scratch())
GENERATION = measures.Generation(prompts=5, new_tokens=6, seed=1, batch=3).pin()
TEXTS = Reading(trial=HEALTHY, measure=GENERATION)
QUESTIONS = measures.Hotflip(of=TEXTS, **{**HOTFLIP, "documents": 0}).pin()
FLIPPED = Reading(trial=HEALTHY, measure=measures.Hotflip(**HOTFLIP).pin())
STEEP = {"site": "mlp.out", "documents": 1, "tokens": 12, "directions": 2, "tolerance": 0.05}
STRING = Reading(
    trial=HEALTHY, measure=measures.Catalyst(**STEEP, length=12, iterations=1, width=2, topk=4, controls=1).pin()
)
DRAWN = measures.Task(task=TestSums(), part="train", sample=6, repeats=4, temperature=1.0, new_tokens=5).pin()
TAUGHT = {"steps": 3, "batch": 2, "length": 48, "warmup": 1, "lr": 0.01}
EXAMPLES: dict[str, list[Step | Measure]] = {
    "noise": [
        steps.Noise(site=s, sigma=0.3, law=k, seed=1)
        for s in SITES
        for k in ("multiplicative", "additive", "lognormal")
    ],
    "ablate": [
        *(steps.Ablate(site=s, share=0.4, seed=2) for s in SITES),
        *(steps.Ablate(site=s, share=0.4, order=o) for s in SITES for o in ("largest", "smallest")),
        steps.Ablate(site="attention", share=0.5, unit="head", seed=3),
        steps.Ablate(site="mlp", share=0.5, unit="neuron", seed=3),
        steps.Ablate(site="attention+mlp", share=0.5, unit="layer", seed=3),
    ],
    "quantise": [
        *(steps.Quantise(site=s, levels=8, scheme=k) for s in SITES for k in ("minmax", "symmetric", "percentile")),
        steps.Quantise(site="all", levels=4, channel="output"),
    ],
    "heal": [steps.Heal(steps=3, batch=2, length=24, warmup=1, lr=0.01, skip=3).pin()],
    "harden": [steps.Harden(steps=3, batch=2, length=24, warmup=1, lr=0.01, skip=3, flips=4).pin()],
    "pretrain": [steps.Pretrain(corpus="austen", steps=3, batch=2, length=24, warmup=1, lr=0.01, skip=20).pin()],
    "streaming": [steps.Streaming(window=9, sinks=0), steps.Streaming(window=9, sinks=2)],
    "extrapolation": [
        measures.Extrapolation(length=8, times=(1, 4), stretches=2, fresh=f).pin() for f in (False, True)
    ],
    "continuation": [measures.Continuation(length=8, times=(1, 4), stretches=2, new_tokens=4).pin()],
    "ngrams": [measures.Ngrams(documents=2, tokens=80, counted="austen", skip=20).pin()],
    "perplexity": [measures.Perplexity(documents=2, tokens=80, window=64, stride=32).pin()],
    "generation": [GENERATION],
    "displacement": [measures.Displacement(reference=HEALTHY, documents=2, tokens=40).pin()],
    "surprisal": [measures.Surprisal(of=TEXTS)],
    "attention": [measures.Attention(documents=2, tokens=40, grid=5).pin()],
    "gcg": [
        measures.Gcg(pairs=(("Say yes. ", "Yes"),), optim_str_init="x x", steps=2, search_width=6, topk=4),
        measures.Gcg(
            pairs=(("a", "b"), ("{string}c", "d")), optim_str_init="x y", steps=1, search_width=4, topk=4, buffer=2
        ),
    ],
    "trigger": [
        measures.Trigger(
            searched=1, documents=2, tokens=16, length=2, restarts=2, iterations=2, topk=3, controls=1, manner=m
        ).pin()
        for m in ("gradient", "coordinate")
    ],
    "benchmark": [measures.Benchmark(task=task, sample=4, seed=1) for task in ("lambada_openai", "copa")],
    "judge": [measures.Judge(of=TEXTS, endpoint="http://localhost:9/v1", model="m", rubric=r) for r in RUBRICS],
    "hotflip": [
        *(measures.Hotflip(**HOTFLIP, manner=m).pin() for m in ("described", "iterative", "random", "query")),
        measures.Hotflip(**HOTFLIP, manner="replay", replay=FLIPPED).pin(),
        measures.Hotflip(**HOTFLIP, stable=True).pin(),
        QUESTIONS,
    ],
    "attacked": [measures.Attacked(clean=TEXTS, attack=Reading(trial=HEALTHY, measure=QUESTIONS))],
    "prose": [measures.Prose(of=TEXTS)],
    "constrain": [
        *(steps.Constrain(init=k) for k in ("abs", "clamp", "signature", "sign-frozen", "abs-free")),
        *(steps.Constrain(site="mlp.in", form=k) for k in ("exponential", "projected")),
        steps.Constrain(init="signature", activation="monotone"),
        steps.Constrain(site="mlp+attention.output", init="signature"),
    ],
    "poison": [
        *(
            steps.Poison(arm=a, steps=2, length=12, lr=0.01, seed=3).pin()
            for a in ("random-fresh", "shuffled", "gaussian")
        ),
        steps.Poison(arm="catalyst", catalyst=STRING, steps=2, length=12, lr=0.01).pin(),
    ],
    "reinitialise": [steps.Reinitialise(seed=4)],
    "catalyst": [STRING.measure, measures.Catalyst(**{**STEEP, "objective": "loss"}, length=8, iterations=1).pin()],
    "curvature": [measures.Curvature(**STEEP, random=1, null=1, degree=8, probes=1, steps=4).pin()],
    "gain": [measures.Gain(**STEEP, reference=HEALTHY, catalyst=STRING).pin()],
    "choose": [steps.Choose(candidates=(Reading(trial=HEALTHY, measure=measures.Order(directions=3)),), value="tau")],
    # in float16 some families overflow: see oracles/test_precision.py
    "precision": [steps.Precision(dtype=d) for d in ("bfloat16", "int8", "nf4")],
    "lora": [steps.Lora(rank=4), steps.Lora(site="attention", alpha=4.0, dropout=0.1, seed=2)],
    "finetune": [steps.Finetune(task=TestSums(), **TAUGHT).pin()],
    "sft": [steps.Sft(task=TestSums(), examples=4, **TAUGHT).pin()],
    "dpo": [
        steps.Dpo(task=TestPairs(), **TAUGHT).pin(),
        steps.Dpo(task=TestPairs(), average=True, cut=3, **TAUGHT).pin(),
    ],
    "verifier": [
        steps.Verifier(samples=Reading(trial=HEALTHY, measure=DRAWN), trunk=t, **TAUGHT) for t in ("decoder", "encoder")
    ],
    "release": [],  # it needs a constraint to end: see unit/test_constrain.py
    "task": [
        DRAWN,
        measures.Task(task=TestSums(), shots=2, new_tokens=4).pin(),
        *(measures.Task(task=TestPairs(), normalise=n).pin() for n in ("total", "tokens", "calibrated")),
        measures.Task(task=TestPairs(), method="generate", new_tokens=3).pin(),
    ],
    "preference": [
        measures.Preference(task=TestPairs(), reference=HEALTHY).pin(),
        measures.Preference(task=TestPairs(), cut=2).pin(),
    ],
    "verification": [],  # it needs a verifier: see oracles/test_verifying.py
    "merge": [],  # it needs adapters to merge: see oracles/test_lora.py
    "match-loss": [],  # what it changes depends on another model: see oracles/test_constraints.py
    "monotonicity": [measures.Monotonicity(documents=2, tokens=24, pairs=8, points=2, needed=False).pin()],
    "order": [measures.Order(directions=5)],
    "spectrum": [
        measures.Spectrum(documents=2, tokens=40).pin(),
        measures.Spectrum(
            of=("activations", "weights", "change"), reference=HEALTHY, documents=2, tokens=24, site="mlp"
        ).pin(),
    ],
}
OF_CAUSAL_MODELS = {"heal", "harden", "pretrain", "perplexity", "displacement", "surprisal", "attention"}
OF_CAUSAL_MODELS |= {
    "dpo",
    "preference",
    "verifier",
    "extrapolation",
    "continuation",
    "benchmark",
    "poison",
    "catalyst",
    "curvature",
    "gain",
    "spectrum",
}
THAT_BUILD = {
    "constrain",
    "precision",
    "lora",
    "merge",
    "verifier",
    "release",
}  # parameters come and go, so they are kept and never undone
OF_OUR_DECODER = {"streaming"}
FAMILIES = list(packaged.TINY)
_specimens = {}


@pytest.fixture(autouse=True)
def a_judge_who_finds_everything_average(monkeypatch):
    """Contracts need no network; the client is tested against a server of its own."""

    def ask(endpoint, model, messages, *, schema, **how):
        scores = {name: (scale["minimum"] + scale["maximum"]) // 2 for name, scale in schema["properties"].items()}
        return {"scores": scores, "reply": "", "model": model, "messages": "", "seconds": 0.0, "attempts": 1}

    importlib.import_module("lesion.measures.judge")
    monkeypatch.setattr("lesion.measures.judge.ask", ask)


@pytest.fixture(autouse=True)
def documents_of_benchmarks_without_a_network(monkeypatch):
    monkeypatch.setattr("lesion.packageddata.documents", invented)
    forget()
    yield
    forget()  # those that follow in this process read the real ones


def forget():
    for known in vars(harness).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


def specimen(family):
    if family not in _specimens:
        _specimens[family] = Bench(Scratch(architecture=family).load())
        here = _specimens[family].specimen
        # what is quoted is of this family here, whatever the quote says
        here.recall = lambda reading: list(reading.measure.read(here, reading.measure.items(here)))
        here.bring = lambda trial: Scratch(architecture=family, seed=1).load()
    return _specimens[family]


def of(family):
    named = [name for name in words(family) if not name.startswith("test-") and name not in THAT_BUILD]
    return [(name, example) for name in named for example in EXAMPLES[name]]


def test_every_step_and_measure_has_examples():
    there = {name for family in ("step", "measure") for name in words(family) if not name.startswith("test-")}
    assert there == set(EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "step"), of("step"), ids=lambda x: str(x)[:60])
def test_a_step_changes_exactly_what_it_reports_and_its_undo_restores_every_bit(family, name, step):
    bench = specimen(family)
    model = bench.specimen.model
    if name in OF_CAUSAL_MODELS and family == "tiny-t5":
        with pytest.raises(ValueError, match="encoder-decoder"):
            step.apply(bench.specimen)
        return
    if name in OF_OUR_DECODER and family != "tiny-decoder":
        with pytest.raises(ValueError, match="lesion-decoder"):
            step.apply(bench.specimen)
        return
    before, config, tokenizer = digests(model), model.config.to_dict(), bench.specimen.tokenizer
    tensors = {n: t.detach().clone() for n, t in model.named_parameters()}
    with bench.applied(step):
        after = digests(model)
        entry = bench.specimen.ledger[-1]
        assert entry["changed"] == [n for n in after if after[n] != before[n]]
        assert set(entry["changed"]) <= set(step.touches(bench.specimen))
        assert entry["changed"] or entry["configuration"], "a dose that does nothing is no example"
        assert (entry["before"], entry["after"]) == (combined(before), combined(after))
        for n, t in model.named_parameters():
            assert torch.isfinite(t).all()
            assert (n in entry["changed"]) == (not torch.equal(t, tensors[n]))
        again = {n: t.detach().clone() for n, t in model.named_parameters()}
    assert digests(model) == before
    assert model.config.to_dict() == config and bench.specimen.tokenizer is tokenizer
    with bench.applied(step):  # the same step on the same weights gives the same bits
        assert all(torch.equal(t, again[n]) for n, t in model.named_parameters())
    assert digests(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [e for name in sorted(THAT_BUILD) for e in EXAMPLES[name]], ids=lambda x: str(x)[:60])
def test_a_step_that_builds_is_kept_and_comes_back_bit_for_bit(family, step, tmp_path):
    subject, store = Scratch(architecture=family), Store(tmp_path / "lab")

    def start():
        here = subject.load()
        here.recall = lambda reading: list(reading.measure.read(here, reading.measure.items(here)))
        return here

    bench = Bench(start())
    if step.name in OF_CAUSAL_MODELS and family == "tiny-t5":
        with pytest.raises(ValueError, match="encoder-decoder"):
            step.apply(bench.specimen)
        return
    before = dict(bench.specimen.digests)
    bench.apply(step)
    made, entry = bench.specimen, bench.specimen.ledger[-1]
    assert entry["changed"] == [n for n, digest in made.digests.items() if before.get(n) != digest] != []
    store.keep(made.trial.key, made)
    again = subject.load()
    step.attach(again.model)
    store.restore(made.trial.key, again)
    assert again.digests == made.digests and again.ledger == made.ledger
    ids = torch.tensor([[5, 6, 7, 8]])
    more = {"decoder_input_ids": ids} if made.model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(*(m.model(input_ids=ids, **more).logits for m in (made, again)))
    other = Bench(start())
    other.apply(step)
    assert other.specimen.digests == made.digests  # and made again it is the same


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_steps_on_overlapping_sites_are_undone_in_order(family):
    bench = specimen(family)
    before = digests(bench.specimen.model)
    first, second, third = (
        steps.Noise(site="all", sigma=0.5),
        steps.Ablate(site="mlp", share=0.5),
        steps.Quantise(site="embedding", levels=3),
    )
    with bench.applied(first):
        inside = digests(bench.specimen.model)
        for step in (second, third, second):
            with bench.applied(step), bench.applied(first):
                pass
            assert digests(bench.specimen.model) == inside
    assert digests(bench.specimen.model) == before


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox", "tiny-gemma3", "tiny-t5"])
@pytest.mark.parametrize(("name", "measure"), of("measure"), ids=lambda x: str(x)[:40])
def test_a_measure_changes_nothing_and_says_the_same_twice(family, name, measure):
    bench = specimen(family)
    if name in OF_CAUSAL_MODELS and family == "tiny-t5":
        with pytest.raises(ValueError, match="encoder-decoder"):
            measure.read(bench.specimen, measure.items(bench.specimen))
        return
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bench.specimen.model.modules()]  # noqa: E731
    listening = hooks()
    items = measure.items(bench.specimen)
    rows = [list(measure.read(bench.specimen, chunk)) for chunk in measure.chunks(items)]
    bench.verify(name, "reading")
    assert hooks() == listening, "hooks that stay would turn `inference` off for whoever comes next"
    flat = list(itertools.chain(*rows))
    assert [row["item"] for row in flat] == items
    again = [row for chunk in measure.chunks(items) for row in measure.read(bench.specimen, chunk)]
    strip = lambda rows: [{k: v for k, v in row.items() if k != "duration"} for row in rows]  # noqa: E731
    assert strip(flat) == strip(again)
    for found in measure.summarise(flat).values():
        for value in found if isinstance(found, list) else [found]:
            assert value is None or math.isfinite(value)


def test_rows_of_all_measures_stand_in_one_frame():
    """A name means one thing: a column that is a number for one measure and a list for another has no type."""
    here, kinds, clashes = specimen("tiny-llama").specimen, {}, []
    for name, measure in of("measure"):
        rows = list(measure.read(here, next(iter(measure.chunks(measure.items(here))))))
        for field, kind in pl.DataFrame(rows, infer_schema_length=None).schema.items():
            kinds.setdefault(field, {}).setdefault(kind, set()).add(name)
    for field, found in kinds.items():
        try:
            pl.concat([pl.DataFrame(schema={field: kind}) for kind in found], how="diagonal_relaxed")
        except pl.exceptions.SchemaError:
            clashes.append((field, found))
    assert not clashes


@pytest.mark.parametrize(("name", "spec"), [*of("step"), *of("measure")], ids=lambda x: str(x)[:60])
def test_specs_go_round_trip_and_keys_differ_when_anything_differs(name, spec):
    import json

    again = Spec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.key == spec.key and type(again) is type(spec)
    seen = {spec.key}
    for field in type(spec).model_fields:
        value = getattr(spec, field)
        for other in changes(value):
            try:
                changed = spec.model_copy(update={field: other})
            except ValueError:
                continue
            assert changed.key not in seen, f"{field}: {value!r} and {other!r} share a key"
            seen.add(changed.key)
    assert len(seen) > 1


def changes(value):
    """Values that are not `value`, the nearest possible one among them."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Trial):
        return [Trial(subject=Scratch(seed=9)), value >> steps.Noise(site="mlp", sigma=0.1)]
    if isinstance(value, Reading):
        return [value.model_copy(update={"trial": trial}) for trial in changes(value.trial)]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [v for v in (math.nextafter(value, math.inf), math.nextafter(value, -math.inf), value / 2) if v != value]
    return [
        *(
            v
            for v in ("multiplicative", "additive", "largest", "smallest", "symmetric", "output", "head", "mlp@1")
            if v != value
        )
    ]


def test_a_subject_a_step_and_a_measure_each_make_another_reading():
    a, b = Scratch(), Scratch(seed=1)
    noise = steps.Noise(site="mlp", sigma=0.1)
    ppl = EXAMPLES["perplexity"][0]
    trials = [a, b, a >> noise, a >> noise >> noise, a >> steps.Noise(site="mlp", sigma=0.1 + 1e-12)]
    readings = product(trials, [ppl, ppl.model_copy(update={"tokens": 81})])
    assert len({r.key for r in readings}) == 10
    assert Reading.from_json(readings[3].to_json()).key == readings[3].key


def test_unknown_words_and_versions_are_named():
    with pytest.raises(
        ValueError, match=r"no step 'nosie'; there are: ablate, choose, constrain, dpo, finetune, harden, .*, streaming"
    ):
        find("step/nosie")
    stale = {**steps.Noise(site="mlp", sigma=1.0).to_json(), "version": 0}
    with pytest.raises(ValueError, match="is version 1 here, the record is of 0"):
        Spec.from_json(stale)
    with pytest.raises(ValueError, match="expected a measure"):
        Measure.from_json(steps.Noise(site="mlp", sigma=1.0).to_json())
