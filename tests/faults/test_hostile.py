"""Safetensors that lie about themselves: refused by name before anything is computed with them, whoever reads the file."""

import json
import logging
import resource
import shutil
import struct

import pytest

from lesion import Lab
from lesion.cli import run
from lesion.fit import fit
from lesion.store import Store
from lesion.subjects import Directory, Scratch
from lesion.trial import Reading, Trial
from oracles.test_fit import HOW, Killed, data, kill_at, model, same, weights
from words import TestNorms, TestTrains


def taken_apart(path):
    """Header and tensor bytes of a safetensors file."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def put_together(path, header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def rewritten(change):
    """A way to harm a file: `change(header, body, name)` gives its new header and body; `name` is the first tensor's."""

    def harm(path):
        header, body = taken_apart(path)
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        put_together(path, *change(header, body, names))

    return harm


def twice(header, body, names):
    """Two tensors of one shape are named twice in the JSON, the second time with each other's place."""
    one, other = [n for n in names if n.endswith(("k_proj.weight", "v_proj.weight"))][:2]
    again = {one: header[other], other: header[one]}
    return f"{json.dumps(header)[:-1]}, {json.dumps(again)[1:]}".encode(), body


def moved(by, end=None):
    def change(header, body, names):
        start, stop = header[names[1]]["data_offsets"]
        header[names[1]]["data_offsets"] = [start + by, stop + (by if end is None else end)]
        return header, body

    return change


def with_a_hole(header, body, names):
    for name in names[1:]:
        header[name]["data_offsets"] = [at + 64 for at in header[name]["data_offsets"]]
    first = header[names[0]]["data_offsets"][1]
    return header, body[:first] + b"\0" * 64 + body[first:]


def described(**fields):
    """The first tensor described otherwise than it is."""
    return rewritten(lambda header, body, names: ({**header, names[0]: {**header[names[0]], **fields}}, body))


def nested(path):
    _, body = taken_apart(path)
    put_together(path, b"[" * 200_000, body)


UNREADABLE = {  # what no reader of the format may accept
    "a header of 2^63 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "a header of 4 GiB": lambda path: path.write_bytes(struct.pack("<Q", 2**32) + path.read_bytes()[8:]),
    "a header longer than the file": lambda path: put_together(path, *taken_apart(path), length=10**7),
    "a header that is no JSON": lambda path: put_together(path, b'{"a": ', b""),
    "a header that is a list": lambda path: put_together(path, b"[]", b""),
    "a header nested 200,000 deep": nested,
    "a header that is not UTF-8": lambda path: put_together(path, b'{"\xff\xfe": 1}', b""),
    "an empty header": lambda path: path.write_bytes(struct.pack("<Q", 0)),
    "overlapping offsets": rewritten(moved(-64)),
    "offsets outside of the file": rewritten(moved(10**9)),
    "offsets that run backwards": rewritten(moved(64, end=-(10**4))),
    "negative offsets": described(data_offsets=[-64, 0]),
    "offsets beyond 2^64": described(data_offsets=[0, 2**65]),
    "a hole between tensors": rewritten(with_a_hole),
    "trailing bytes": rewritten(lambda header, body, names: (header, body + b"\0" * 64)),
    "missing bytes": rewritten(lambda header, body, names: (header, body[:-64])),
    "a shape of 2^62 numbers": described(shape=[2**31, 2**31]),
    "a shape whose product overflows": described(shape=[2**33, 2**33]),
    "a type that does not exist": described(dtype="F33"),
    "a type of another width": described(dtype="F64"),
    "a key named twice in the header": rewritten(twice),
}


def renamed(header, body, names):
    return {n + (".other" if n == names[0] else ""): entry for n, entry in header.items()}, body


def joined(header, body, names):
    """The first tensor as one long row: another shape of as many numbers."""
    entry = header[names[0]]
    rows, columns = (entry["shape"] + [1])[:2]
    return {**header, names[0]: {**entry, "shape": [rows * columns]}}, body


def of_booleans(header, body, names):
    """Four matrices as one of truth values, of the right shape."""
    shape = header[names[0]]["shape"]
    size = shape[0] * shape[1]
    rest = {"rest": {"dtype": "U8", "shape": [3 * size], "data_offsets": [size, 4 * size]}}
    return {**header, names[0]: {"dtype": "BOOL", "shape": shape, "data_offsets": [0, size]}, **rest}, body


MISFITS = {  # well formed, and not this model
    "a missing tensor": rewritten(renamed),
    "a tensor of another shape": rewritten(joined),
    "a tensor of integers": described(dtype="I32"),
    "a tensor of booleans": rewritten(of_booleans),
}


# ---------------------------------------------------------------------- a folder given as subject

REFUSED = "ValueError naming the file, exit code 2, nothing computed"
STUDY = ["run", "degrade", "--doses", "0", "--site", "mlp", "--repeats", "1", "--measures", "perplexity"]
STUDY += ["--documents", "1", "--tokens", "16", "--verbosity", "quiet"]
ROOM = 200 * 2**10  # KiB of memory that all refusals together may take


@pytest.fixture(autouse=True)
def memory_is_not_exhausted():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_folder_is_refused_by_its_files_name(folder, tmp_path, how, capsys, fault):
    UNREADABLE[how](folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors (is not a whole safetensors file|holds \S+, which has been)"
    ):
        Directory(path=str(folder)).pin()
    assert run([*STUDY, "--subject", str(folder), "--lab", str(tmp_path / "lab")]) == 2
    assert str(folder / "model.safetensors") in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()
    fault("hostile safetensors as subject", how, REFUSED)


@pytest.mark.parametrize("how", MISFITS)
def test_weights_of_another_model_are_refused_by_the_weights_name(folder, tmp_path, how, fault):
    MISFITS[how](folder / "model.safetensors")
    subject = Directory(path=str(folder)).pin()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight") as caught:
        subject.load()
    assert str(folder) in str(caught.value)
    store = Lab(tmp_path / "lab").take([Reading(trial=subject, measure=TestNorms())])
    assert not store.index.seals and not store.index.states and not store.index.begun
    assert [failure["error"] for failure in store.index.failures.values()] == [f"ValueError: {caught.value}"]
    fault("hostile safetensors as subject", how, "ValueError naming the weight, recorded, nothing computed")


# ---------------------------------------------------------------------- a kept state of the lab

KEPT = Trial(subject=Scratch()) >> TestTrains()


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """A lab with a kept state, and what it holds once one more measure has been taken of it."""
    path = tmp_path_factory.mktemp("labs")
    Lab(path / "begun").take([Reading(trial=KEPT, measure=TestNorms())])
    shutil.copytree(path / "begun", path / "whole")
    return path / "begun", list(more(path / "whole").canonical())


def more(path):
    return Lab(path).take([Reading(trial=KEPT, measure=TestNorms(power=2.0))])


@pytest.mark.parametrize("how", [*UNREADABLE, *MISFITS, "an extra tensor"])
def test_a_kept_state_is_refused_and_can_be_put_right(labs, tmp_path, how, fault):
    lab = shutil.copytree(labs[0], tmp_path / "lab")
    weights = lab / "states" / KEPT.key / "model.safetensors"
    good = weights.read_bytes()
    {**UNREADABLE, **MISFITS, "an extra tensor": rewritten(extra)}[how](weights)
    before = b"".join(Store(lab).canonical())
    store = more(lab)
    (failure,) = store.index.failures.values()
    assert failure["of"] == KEPT.key and failure["error"].startswith("ValueError: the kept state")
    assert str(weights.parent) in failure["error"]
    added = {"is": "failure", "of": KEPT.key, "error": failure["error"]}
    assert set(store.canonical()) - set(before.splitlines(keepends=True)) == {
        json.dumps(added, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    }
    assert run(["export", KEPT.key[:12], str(tmp_path / "out"), "--lab", str(lab)]) == 2
    assert not (tmp_path / "out").exists()
    weights.write_bytes(good)
    assert list(more(lab).canonical()) == labs[1]
    fault("hostile safetensors as kept state", how, "recorded by name; put right, finished byte-identical")


def extra(header, body, names):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    return {**header, "more.weight": entry}, body + b"\0" * 4


LEDGERS = {
    "half a JSON": '[{"after": "',
    "not UTF-8": b'["\xff"]',
    "another digest": '[{"after": "0123456789abcdef0123456789abcdef"}]',
    "an empty list": "[]",
    "an object": "{}",
    "null": "null",
    "an entry that is no object": "[1]",
    "an entry without a digest": "[{}]",
    "an array nested 200,000 deep": "[" * 200_000 + "]" * 200_000,
    "no file": None,
}


@pytest.mark.parametrize("how", LEDGERS)
def test_a_kept_state_whose_ledger_makes_no_sense(labs, tmp_path, how, capsys, fault):
    lab = shutil.copytree(labs[0], tmp_path / "lab")
    ledger, text = lab / "states" / KEPT.key / "ledger.json", LEDGERS[how]
    good = ledger.read_bytes()
    ledger.unlink()
    if text is not None:
        ledger.write_bytes(text if isinstance(text, bytes) else text.encode())
    (failure,) = more(lab).index.failures.values()
    assert failure["error"].startswith("ValueError: the kept state") and str(ledger.parent) in failure["error"]
    assert run(["export", KEPT.key[:12], str(tmp_path / "out"), "--lab", str(lab)]) == 2
    ledger.write_bytes(good)
    assert list(more(lab).canonical()) == labs[1]
    fault("hostile ledger of a kept state", how, "recorded by name; put right, finished byte-identical")


# ---------------------------------------------------------------------- a checkpoint of a training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = model()
    fit(made, data(), HOW, folder=tmp_path_factory.mktemp("trained"))
    return weights(made)


@pytest.mark.parametrize("how", [*UNREADABLE, "an extra tensor"])
def test_a_training_goes_on_from_the_checkpoint_before_a_hostile_one(tmp_path, trained, how, caplog, fault):
    with pytest.raises(Killed):
        fit(model(), data(), HOW, folder=tmp_path, tell=kill_at(10))  # checkpoints are at 4 and 8
    {**UNREADABLE, "an extra tensor": rewritten(extra)}[how](tmp_path / "step-00000008" / "model.safetensors")
    again = model()
    with caplog.at_level(logging.WARNING, "lesion"):
        fit(again, data(), HOW, folder=tmp_path)
    assert ["step-00000008 is damaged" in record.getMessage() for record in caplog.records] == [True]
    assert same(weights(again), trained)
    fault("hostile safetensors as checkpoint", how, "said aloud, the one before it used, finished bit-identical")
