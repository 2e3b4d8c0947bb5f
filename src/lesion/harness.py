"""Tasks of the LM evaluation harness (Gao et al. 2021, EleutherAI's `lm-eval`), by their names, on a model on the bench.

Prompts, answers, tokens and scores are lm-eval's own: its task configuration makes the requests, its rules cut them into
tokens, its metric code scores what came out. Two things are not: documents may come from a pinned package instead of the
hub, and likelihoods come from `lesion.continuations`. lm-eval's caches of requests and of answers are never used: the
latter know a model by its name, and here its weights change.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from lesion import packageddata
from lesion.continuations import Score, score

KINDS = ("loglikelihood", "multiple_choice")  # kinds of task that are read; the others generate or have no answers
SHOTS_SEED = 1234  # lm-eval's own for the choice of examples
PACKAGED, HUB = "packaged", "hub"


@dataclass(frozen=True)
class Question:
    """A document of a task and what is asked about it: pairs of context and continuation."""

    item: str
    number: int  # of the document in its split, as lm-eval counts
    requests: tuple[tuple[str, str], ...]
    gold: list[int]  # which of the requests have the right answer
    document: dict[str, Any]


@dataclass(frozen=True)
class Exam:
    """An lm-eval task and the questions that are asked of it, by item."""

    task: Any
    questions: dict[str, Question]

    @property
    def digest(self) -> str:
        """sha256 of what is asked and of the task's version: other prompts, answers or rules ask for other readings."""
        config = self.task.config
        said = {
            "task": config.task,
            "version": str(self.task.VERSION),
            "metrics": sorted(self.task.aggregation()),
            "questions": [[q.item, q.requests, q.gold] for q in self.questions.values()],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def exam(name: str, source: str, revision: str | None, shots: int | None, sample: int, seed: int) -> Exam:
    """The task `name` with its documents, and the questions of a sample of them.

    Raises ValueError where lm-eval is not installed, for a name that it does not know, a kind of task that is not read here,
    documents that cannot be had or have no labels, and examples that there are none of.
    """
    task = build(name, source, revision)
    known = task.config.num_fewshot  # and it stays: the task is remembered, and others ask it with other examples
    if shots is not None and known == 0 and shots:
        raise ValueError(
            f"{name} is a task without examples (its prompt has its own), so few_shot={shots} cannot be had"
        )
    shots = (known or 0) if shots is None else shots
    task.set_fewshot_seed(SHOTS_SEED)
    pool = task.sampler.fewshot_docs() if hasattr(task, "sampler") else []
    if shots and len(pool) <= shots:
        where = "hold no split to take them from; source='hub' has it" if source == PACKAGED else "are too few"
        raise ValueError(f"{name} was to begin with {shots} examples, but its {source} documents ({len(pool)}) {where}")
    chosen = draw(len(task.task_docs), sample, seed, name)
    right = {number: gold(task, task.task_docs[number], name, number) for number in chosen}
    questions: dict[str, Question] = {}
    # examples are drawn from one stream, document after document, so the documents before a chosen one draw as well
    for number in range(max(chosen) + 1) if shots else chosen:
        document = task.task_docs[number]
        before = task.fewshot_context(document, num_fewshot=shots, gen_prefix=task.doc_to_prefix(document))
        if number in right:
            asked = task.construct_requests(doc=document, ctx=before, metadata=(name, number, 1))
            requests = tuple((r.args[0], r.args[1]) for r in (asked if isinstance(asked, list) else [asked]))
            item = item_of(name, number)
            questions[item] = Question(item, number, requests, right[number], document)
    return Exam(task, questions)


def item_of(name: str, number: int) -> str:
    return f"{name}/{number:05d}"


def draw(documents: int, sample: int, seed: int, name: str) -> list[int]:
    """Numbers of a random sample without replacement, ascending; 0: all. A larger sample of the same seed holds the smaller.

    Documents are taken in the order of sha256(seed, item), so whether one is in depends on nothing but its rank.
    """
    if not 0 < sample < documents:
        return list(range(documents))
    rank = lambda n: hashlib.sha256(f"benchmark {seed} {item_of(name, n)}".encode()).digest()  # noqa: E731
    return sorted(sorted(range(documents), key=rank)[:sample])


def gold(task: Any, document: dict[str, Any], name: str, number: int) -> list[int]:
    """Which answers are right; [0] where the right one is the only one. ValueError where no label says so."""
    try:
        said = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        if task.OUTPUT_TYPE != "multiple_choice":
            right, answers = [0] if isinstance(said, str) and said.strip() else [], 1
        else:
            choices = task.doc_to_choice(document)
            right = [
                choices.index(s) if isinstance(s, str) else s for s in (said if isinstance(said, list) else [said])
            ]
            answers = len(choices)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"document {number} of {name} has no label that its task can read: {error!r}") from error
    if not right or not all(isinstance(i, int) and 0 <= i < answers for i in right):
        raise ValueError(f"document {number} of {name} has no label: expected one of its answers, got {said!r}")
    return right


@lru_cache(maxsize=4)
def build(name: str, source: str, revision: str | None) -> Any:
    """lm-eval's task of this name, reading documents from this source."""
    config = configuration(name)
    if source == PACKAGED:
        data = packaged_documents(name, config)
    else:
        data = hub_documents(config, revision if is_commit(revision) else hub_commit(config, revision))
    with quietly():
        from lm_eval.api.task import ConfigurableTask

        try:
            return ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"the {source} documents of {name} do not fit its task (no labels?): {error!r}") from error


def configuration(name: str) -> dict[str, Any]:
    """The task's YAML as a dictionary. Raises ValueError for an unknown name, for a group of tasks, and for a kind of task
    that is not read here."""
    try:
        from lm_eval import tasks
        from lm_eval.tasks._yaml_loader import load_yaml
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        raise ValueError(f"benchmarks need lm-eval, and {missing}: pip install 'lesion[benchmarks]'") from error
    with quietly():
        entry = _entry(name, Path(tasks.__file__).parent)
        config: dict[str, Any] = load_yaml(entry.yaml_path) if entry.yaml_path else {}
    if entry.kind.name in ("GROUP", "TAG"):
        raise ValueError(f"{name!r} is a group of lm-eval's tasks; name one of them")
    kind = config.get("output_type", "generate_until")
    what = f"of the kind {kind}" if kind not in KINDS else "one with filters" if config.get("filter_list") else ""
    if entry.kind.name == "PY_TASK" or config.get("custom_dataset"):
        what = "a program of its own"
    if what:
        raise ValueError(f"lm-eval's task {name!r} is {what}; read here are {' and '.join(KINDS)} without filters")
    return {k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}


@lru_cache(maxsize=64)
def _entry(name: str, root: Path) -> Any:
    """Where lm-eval keeps a task. To parse its 14,000 takes many seconds, so files that name it are looked for first."""
    from lm_eval.tasks import TaskManager

    named = re.compile(rf"^task: *[\"']?{re.escape(name)}[\"']? *$".encode(), re.M)
    for path in sorted(root.rglob("*.yaml")) if name.strip() else ():
        if named.search(path.read_bytes()):
            near = TaskManager(include_defaults=False, include_path=path.parent).task_index
            if name in near and near[name].kind.name == "TASK":
                return near[name]
    index = _index()
    if name not in index:
        like = ", ".join(difflib.get_close_matches(name, index, n=5)) or ", ".join(packageddata.PARTS)
        raise ValueError(f"lm-eval has no task {name!r}; there are, among {len(index)}: {like}")
    return index[name]


@lru_cache(maxsize=1)
def _index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def packaged_documents(name: str, config: dict[str, Any]) -> Any:
    """The packaged documents as the hub's dataset: a dictionary of splits, empty where the package has none."""
    import datasets

    split, documents = packageddata.documents(name)
    full = datasets.Dataset.from_list(documents)
    named = {str(config.get(f"{part}_split")) for part in ("training", "validation", "test", "fewshot")}
    return datasets.DatasetDict({split: full, **{other: full.select([]) for other in sorted(named - {"None", split})}})


def hub_documents(config: dict[str, Any], commit: str) -> Any:
    """The hub's dataset at a commit, from the cache where it lies there. Raises ValueError where it cannot be had."""
    from lesion.hub import ask

    with quietly():
        import datasets

        options = {**(config.get("dataset_kwargs") or {}), "name": config.get("dataset_name")}
        options.pop("trust_remote_code", None)  # no code of a repository is run
        data = ask(datasets.load_dataset, config["dataset_path"], commit, **options)
    # where the hub is out of reach, `datasets` takes what its cache had last, whatever commit was asked for
    files = (Path(file["filename"]) for split in data.values() for file in split.cache_files)
    if others := {path.parent.name for path in files} - {commit}:
        there = ", ".join(sorted(others))
        raise ValueError(f"{config['dataset_path']}@{commit} could not be fetched; the cache of datasets has {there}")
    return data


def is_commit(revision: str | None) -> TypeGuard[str]:
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def hub_commit(config: dict[str, Any], revision: str | None) -> str:
    """The commit that a branch or tag (None: main) of the hub's dataset is at. Raises ValueError where no hub answers."""
    from huggingface_hub import HfApi

    from lesion.hub import ask

    return str(ask(HfApi().dataset_info, config["dataset_path"], revision or "main").sha)


def answer(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[tuple[list[Score], list[int], int]]:
    """For each question the score of every continuation, their lengths in tokens, and by how many tokens the longest
    text was cut on its left to fit the model."""
    reader = _reader(model, tokenizer)
    texts = [request for question in questions for request in question.requests]
    cut, pairs = [], []
    for (context, continuation), before, after in reader.tokens(texts):
        if not 0 < len(after) <= reader.max_length:
            fault = f"{len(after)} tokens, expected 1 to {reader.max_length}"
            raise ValueError(f"the continuation {continuation[:40]!r} of {context[-40:]!r} has {fault}")
        room = reader.max_length + 1 - len(after)  # the last token is predicted and not read
        cut.append(max(0, len(before) - room))
        pairs.append((tuple(before[-room:]), tuple(after)))
    scores, start, found = score(model, pairs), 0, []
    for question in questions:
        part = slice(start, start := start + len(question.requests))
        found.append((scores[part], [len(after) for _, after in pairs[part]], max(cut[part])))
    return found


def _reader(model: Any, tokenizer: Any) -> Any:
    """lm-eval's model of transformers as far as it makes tokens. Its own start is left out: that one chooses a padding token
    for the tokenizer and ties weights, and here nothing may change."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        def __init__(self) -> None:
            LM.__init__(self)
            self._model, self.tokenizer, self.backend = model, tokenizer, "causal"
            self.add_bos_token = self.custom_prefix_token_id = self._max_length = None
            self.enable_thinking = False

        def tokens(self, texts: Sequence[tuple[str, str]]) -> Any:
            from lm_eval.api.instance import Instance

            return self.loglikelihood([Instance("loglikelihood", {}, text, 0) for text in texts], disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return requests  # not scored here

    return Reader()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and remarks of lm-eval and datasets for the length of a `with` block."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
