"""The sentences of `monotone`: arms on one subject, and what is read of each.

    pretrained      subject
    baseline        subject → heal                         for lr, of which the best on kept text is chosen
    <constraint>    subject → constrain → heal             the same data, steps, rates and seeds
    matched         baseline → noise of the dose at which its clean loss is that of the main constraint
    hardened        subject → harden                       adversarial training, for comparison

Before recovery a constraint is read too, with no seed: nothing in it is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lesion.trial import Measure, Reading, Subject, Trial

PRETRAINED, BASELINE, MATCHED, HARDENED = "pretrained", "baseline", "matched", "hardened"
CONSTRAINTS: dict[str, dict[str, Any]] = {  # arm → options of `constrain`
    "abs": {"init": "abs"},
    "clamp": {"init": "clamp"},
    "signature": {"init": "signature"},
    "projected": {"init": "signature", "form": "projected"},
    "certified": {"init": "signature", "form": "projected", "activation": "monotone"},
    "sign-frozen": {"init": "sign-frozen"},
    "abs-free": {"init": "abs-free"},
    "signature-free": {"init": "signature"},
}
FREED = ("signature-free",)  # controls that start as a constraint does, and of which nothing is held during recovery
SETTING = 64  # seed offset of the noise that a baseline is matched with


@dataclass(frozen=True)
class Scale:
    """How large everything is for one subject."""

    subject: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    main: str
    site: str
    rates: tuple[float, ...]
    training: Mapping[str, Any]
    warmups: tuple[float, float]  # share of the steps: of the baseline, of constrained arms
    held_out: str
    documents: int
    tokens: int
    attack: Mapping[str, Any]
    trigger: Mapping[str, Any]
    questions: Mapping[str, Any]  # of the battery that is attacked; none: {}
    benchmarks: Mapping[str, Mapping[str, Any]]  # task → its options
    skip: int = 12
    distil: float = 0.0
    anneal: float = 0.0
    coordinate: bool = True  # whether triggers are also sought as described


@dataclass
class Arms:
    """Readings by arm, stage ("before" or "after" recovery), seed and name."""

    scale: Scale
    _cells: dict[tuple[str, str, int], dict[str, Reading]] = field(default_factory=dict)

    @cached_property
    def subject(self) -> Subject:
        from lesion.subjects import parse

        return parse(self.scale.subject).pin()

    @cached_property
    def loss(self) -> Measure:
        """The primary measure, on text that nobody trains on."""
        return self._loss_on(self.scale.held_out, self.scale.documents)

    @cached_property
    def kept(self) -> Measure:
        """What rates are chosen by: the documents of the training corpus that are not trained on."""
        return self._loss_on(self.scale.training["corpus"], self.scale.skip)

    def _loss_on(self, corpus: str, documents: int) -> Measure:
        from lesion.measures import Perplexity

        tokens = self.scale.tokens
        return Perplexity(corpus=corpus, documents=documents, tokens=tokens, window=tokens, stride=tokens // 2).pin()

    def constraint(self, arm: str) -> Trial:
        """An arm before its recovery."""
        from lesion.steps import Constrain, Release

        held = Trial(subject=self.subject) >> Constrain(site=self.scale.site, **CONSTRAINTS[arm])
        return held >> Release() if arm in FREED else held

    @cached_property
    def _found(self) -> dict[tuple[str, int], Trial]:
        return {}

    def trial(self, arm: str, seed: int) -> Trial:
        """An arm as it is attacked."""
        key = arm, seed
        if key not in self._found:
            self._found[key] = self._trial(arm, seed)
        return self._found[key]

    def _trial(self, arm: str, seed: int) -> Trial:
        from lesion.steps import Choose, MatchLoss, Noise

        start = Trial(subject=self.subject)
        if arm == PRETRAINED:
            return start
        if arm == MATCHED:
            to = Reading(trial=self.trial(self.scale.main, seed), measure=self.loss)
            noise = Noise(site="all", sigma=0.05, seed=SETTING + seed)
            return (self.trial(BASELINE, seed) >> MatchLoss(to=to, step=noise)).pin()
        tried = [self._recovered(arm, seed, rate) for rate in self.scale.rates]
        if len(tried) == 1:
            return tried[0]
        return start >> Choose(candidates=tuple(Reading(trial=trial, measure=self.kept) for trial in tried))

    def _recovered(self, arm: str, seed: int, rate: float) -> Trial:
        from lesion.steps import Harden, Heal

        s = self.scale
        plain = arm in (BASELINE, HARDENED)
        warmup = round(s.warmups[0 if plain else 1] * s.training["steps"])
        how: dict[str, Any] = {**s.training, "lr": rate, "seed": seed, "skip": s.skip, "warmup": warmup}
        if arm == HARDENED:
            return (Trial(subject=self.subject) >> Harden(**how)).pin()
        if not plain and (s.distil or s.anneal):
            how |= {"teacher": Trial(subject=self.subject), "distil": s.distil, "anneal": s.anneal}
        start = Trial(subject=self.subject) if plain else self.constraint(arm)
        return (start >> Heal(**how)).pin()

    def cells(self) -> dict[tuple[str, str, int], dict[str, Reading]]:
        """(arm, stage, seed) → name → reading. What has no seed is read once, under the first."""
        if not self._cells:
            first = self.scale.seeds[0]
            self._cells[PRETRAINED, "before", first] = self._read(
                self.trial(PRETRAINED, first), PRETRAINED, first, True
            )
            for arm in self.scale.arms:
                if arm in CONSTRAINTS:
                    self._cells[arm, "before", first] = self._read(self.constraint(arm), arm, first, False)
                for seed in self.scale.seeds:
                    self._cells[arm, "after", seed] = self._read(self.trial(arm, seed), arm, seed, True)
        return self._cells

    def _read(self, trial: Trial, arm: str, seed: int, attacked: bool) -> dict[str, Reading]:
        from lesion.measures import Hotflip, Monotonicity, Order, Trigger

        s = self.scale
        asked: dict[str, Measure] = {"loss": self.loss, "order": Order()}
        asked["monotonicity"] = Monotonicity(corpus=s.held_out, documents=2, needed=self.holds(arm)).pin()
        if attacked:
            flips = {"corpus": s.held_out, **s.attack}
            manners = ["described", "iterative"]
            manners += ["random"] if arm in (BASELINE, s.main) else []
            manners += ["query"] if arm in self.judged else []
            for manner in manners:
                asked[manner] = Hotflip(manner=manner, seed=seed, **flips).pin()
            if arm in self.judged:
                asked |= self._judged(trial, arm, seed, Hotflip, Trigger)
        for task, how in s.benchmarks.items():
            from lesion.measures import Benchmark

            asked[f"benchmark {task}"] = Benchmark(task=task, **how).pin()
        found = {name: Reading(trial=trial, measure=measure) for name, measure in asked.items()}
        if attacked and s.questions and arm in self.judged:
            found |= self._answers(trial)
        return found

    def _judged(self, trial: Trial, arm: str, seed: int, flip: Any, trigger: Any) -> dict[str, Measure]:
        """Triggers, and what was found on other arms of the same seed."""
        s = self.scale
        how = {"corpus": s.held_out, "seed": seed, **s.trigger}
        asked: dict[str, Measure] = {"trigger": trigger(manner="gradient", **how).pin()}
        if s.coordinate:
            asked["trigger described"] = trigger(manner="coordinate", **how).pin()
        for other in self.judged:
            if other != arm:
                theirs = self.trial(other, seed)
                own = flip(manner="iterative", seed=seed, corpus=s.held_out, **s.attack).pin()
                replay = Reading(trial=theirs, measure=own)
                asked[f"replay of {other}"] = flip(manner="replay", replay=replay, corpus=s.held_out, **s.attack).pin()
                quote = Reading(trial=theirs, measure=asked["trigger"])
                asked[f"trigger of {other}"] = trigger(quote=quote, **how).pin()
        return asked

    def _answers(self, trial: Trial) -> dict[str, Reading]:
        """What an attack on questions does to the answers and their correctness."""
        from lesion.measures import Attacked, Generation, Hotflip

        clean = Reading(trial=trial, measure=Generation(**{"temperature": 0.0, **self.scale.questions}).pin())
        flips = {k: v for k, v in self.scale.attack.items() if k in ("flips", "candidates", "stable")}
        attack = Reading(trial=trial, measure=Hotflip(of=clean, documents=0, target=16, **flips).pin())
        return {
            "answers": clean,
            "questions": attack,
            "attacked answers": Reading(trial=trial, measure=Attacked(clean=clean, attack=attack).pin()),
        }

    @property
    def judged(self) -> tuple[str, ...]:
        """Arms that are compared with each other in every way; the others have the attacks on themselves alone."""
        wanted = (BASELINE, self.scale.main, MATCHED, HARDENED)
        return tuple(dict.fromkeys(arm for arm in wanted if arm in self.scale.arms))

    def holds(self, arm: str) -> bool:
        """Whether an arm promises signs that can be certified."""
        return arm not in FREED and CONSTRAINTS.get(arm, {}).get("init") in ("abs", "clamp", "signature")
