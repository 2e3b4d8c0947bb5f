"""Corpora of a hub on this machine: files are matched, read, joined to articles and known by what they hold.

What asks the hub runs in child processes of `hubserver`.
"""

import hashlib
import json
import shutil
from collections import Counter
from contextlib import closing

import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubserver import FIRST, SECOND, SECRET, Server, child, nowhere
from lesion import hubtexts
from lesion.texts import corpus

ACT = """
from lesion.texts import corpus, corpus_digest

def act(what, fields):
    if what == "corpus":
        return [[document.id, document.text] for document in corpus(fields)]
    if what == "digest":
        return corpus_digest(fields)
    if what == "often":
        return sorted({corpus_digest(fields) for _ in range(50)})
    if what == "tidied":
        import os, shutil
        first = corpus(fields)
        shutil.rmtree(os.environ["HF_HOME"])
        return corpus(fields) == first
    if what == "train":
        from lesion.steps import Heal
        return Heal(corpus=fields, steps=1, seed=1).pin().sha256
    from lesion.measures import Perplexity
    measure = Perplexity(**fields).pin()
    if what == "pin":
        return measure.sha256
    from lesion import Lab
    from lesion.subjects import Scratch
    return Lab("lab").read([Scratch(seed=1)], [measure])["item"].to_list()
"""

HEADINGS = [" = Robert Boulter = \n", " = 4 = 2 + 2 = \n", " = I = \n", " = Last title = "]
NO_HEADINGS = [
    " = = Career = = \n",
    " = = = 2000 = = = \n",
    " = \n",
    " = = \n",
    "= Bare = \n",
    " =  = \n",
    "x = Late = \n",
]


@pytest.fixture
def hub():
    with closing(Server()) as server:
        yield server


@pytest.fixture
def shards(tmp_path):
    """A repository of two parquet shards of a training split, one of another split, and what nobody asked for."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    table(folder / "data" / "train-00001-of-00002.parquet", text=["third", "fourth  "], label=[0, 1])
    table(folder / "data" / "train-00000-of-00002.parquet", text=["first\r\n", ""], label=[1, 1])
    table(folder / "data" / "validation-00000-of-00001.parquet", text=["other"], label=[0])
    for name in ("README.md", "train.py", "data/train-00000-of-00002.txt"):
        (folder / name).write_text("nobody asked for this")
    return folder


TRAIN = "hub:org/stories:data/train-*.parquet"


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    polars.DataFrame(columns).write_parquet(path)


def listed(folder, *names):
    """sha256 of what `sha256sum` prints of the files."""
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def ask(tmp_path, hub, *acts, **environment):
    return child(ACT, tmp_path, hub.url, [list(act) for act in acts], **environment)


def test_shards_are_read_in_the_order_of_their_names_and_again_without_the_hub(hub, shards, tmp_path):
    hub.add("datasets/org/stories", shards)
    documents, digest = ask(tmp_path, hub, ("corpus", TRAIN), ("often", TRAIN), HF_TOKEN=SECRET)
    assert documents["does"] == [
        ["stories/document-0000001", "first\r\n"],
        ["stories/document-0000002", ""],
        ["stories/document-0000003", "third"],
        ["stories/document-0000004", "fourth  "],
    ]
    names = [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert digest["does"] == [listed(shards, *names)]
    nowhere(tmp_path)
    asked = Counter(path for method, path, _ in hub.asked if method == "GET")
    assert {path.split("/resolve/")[1] for path in asked if "/resolve/" in path} == {f"{FIRST}/{n}" for n in names}
    assert set(asked.values()) == {1}, "each file once, and a process asks once what a branch is"
    assert not [a for a in hub.asked if a[2] != f"Bearer {SECRET}"]

    before = len(hub.asked)
    assert ask(tmp_path, hub, ("corpus", TRAIN), ("often", TRAIN), HF_HUB_OFFLINE="1") == [documents, digest]
    assert len(hub.asked) == before
    hub.close()
    pinned = TRAIN.replace("stories:", f"stories@{FIRST}:")
    assert ask(tmp_path, hub, ("corpus", TRAIN), ("corpus", pinned), ("often", pinned)) == [
        documents,
        documents,
        digest,
    ]


def test_a_cache_that_somebody_tidied_is_filled_again(hub, shards, tmp_path):
    hub.add("datasets/org/stories", shards)
    (answer,) = ask(tmp_path, hub, ("tidied", TRAIN))
    assert answer["does"] is True


def test_a_part_of_the_shards_in_the_cache_is_not_taken_for_all_of_them(hub, shards, tmp_path):
    hub.add("datasets/org/stories", shards)
    one = TRAIN.replace("*", "00001-*")
    (first,) = ask(tmp_path, hub, ("corpus", one))
    assert [text for _, text in first["does"]] == ["third", "fourth  "]
    again, all_of_them = ask(tmp_path, hub, ("corpus", one), ("corpus", TRAIN), HF_HUB_OFFLINE="1")
    assert again == first
    assert all_of_them["error"] == (
        "org/stories@main is not in the hub's cache, or not all of it, and HF_HUB_OFFLINE is set"
    )


def test_a_moved_branch_is_noticed_by_what_it_holds_and_not_by_its_commit(hub, shards, tmp_path):
    hub.add("datasets/org/stories", shards)
    first, trained = ask(tmp_path, hub, ("pin", {"corpus": TRAIN}), ("train", TRAIN))
    pinned = ("pin", {"corpus": TRAIN, "sha256": first["does"]})
    assert trained == first
    other = shutil.copytree(shards, tmp_path / "other")
    (other / "README.md").write_text("a better one")
    hub.add("datasets/org/stories", other, SECOND)
    assert ask(tmp_path, hub, pinned) == [first], "another commit with the same files"

    table(other / "data" / "train-00001-of-00002.parquet", text=["third", "forth"], label=[0, 1])
    third = "3" * 40
    hub.add("datasets/org/stories", other, third)
    moved, now, then, old = ask(
        tmp_path,
        hub,
        pinned,
        ("digest", TRAIN),
        ("digest", TRAIN.replace("stories:", f"stories@{SECOND}:")),
        ("corpus", TRAIN.replace("stories:", f"stories@{FIRST}:")),
    )
    assert moved["error"] == f"corpus {TRAIN!r} was to have sha256 {first['does']} but has {now['does']}"
    assert now["does"] != first["does"] == then["does"] and old["does"][-1][1] == "fourth  "

    (other / "data" / "train-00001-of-00002.parquet").rename(other / "data" / "train-00002-of-00002.parquet")
    hub.add("datasets/org/stories", other, "4" * 40)
    (renamed,) = ask(tmp_path, hub, ("digest", TRAIN))
    assert renamed["does"] != now["does"], "names are part of what is pinned"


def test_ids_of_the_files_are_kept_and_other_formats_read_as_a_users_own(hub, tmp_path):
    folder = tmp_path / "mixed"
    table(folder / "ids.parquet", id=["a", None, "c"], text=["one", "two", "three"])
    table(folder / "numbers.parquet", id=[7, 9], text=["one", "two"])
    rows = [{"text": "b\u2028c", "label": 3}, {"id": 5, "text": ""}]
    (folder / "part-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (folder / "part-2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    (folder / "a.csv").write_text('text,year\n"x, y",1815\n')
    (folder / "a.txt").write_text("\ufeffOne\r\n\f\r\ntwo\r\n")
    hub.add("datasets/org/mixed", folder)
    names = ("ids.parquet", "numbers.parquet", "part-*.jsonl", "a.csv", "a.txt")
    answers = ask(tmp_path, hub, *[("corpus", f"hub:org/mixed:{name}") for name in names])
    assert [answer["does"] for answer in answers] == [
        [["a", "one"], ["mixed/document-0000002", "two"], ["c", "three"]],
        [["7", "one"], ["9", "two"]],
        [["mixed/document-0000001", "b\u2028c"], ["5", ""]],
        [["mixed/document-0000001", "x, y"]],
        [["mixed/document-0000001", "One"], ["mixed/document-0000002", "two"]],
    ]


def test_lines_of_wikitext_are_joined_to_articles_across_shards(hub, tmp_path):
    first = [" \n", HEADINGS[0], " \n", " Robert is an actor .\n", NO_HEADINGS[0], " \n", " He = good = .\n", " \n"]
    second = [HEADINGS[1], " \n", " A sum .\n"]
    rows = ["" if line == " \n" else line for line in first + second]  # as the hub holds them
    folder = tmp_path / "wikitext"
    for kind in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        table(folder / kind / "train-00000-of-00002.parquet", text=rows[:4])
        table(folder / kind / "train-00001-of-00002.parquet", text=rows[4:])
        table(folder / kind / "validation-00000-of-00001.parquet", text=["", *rows[8:]])
        table(folder / kind / "test-00000-of-00001.parquet", text=["no title\n", "", *rows[8:]])
    table(tmp_path / "stories" / "data" / "train-00000-of-00001.parquet", text=rows[1:4])
    table(tmp_path / "stories" / "data" / "validation-00000-of-00001.parquet", text=["Once ."])
    hub.add("datasets/Salesforce/wikitext", folder)
    hub.add("datasets/roneneldan/TinyStories", tmp_path / "stories")
    names = list(hubtexts.ALIASES)
    found = dict(zip(names, ask(tmp_path, hub, *[("corpus", name) for name in names]), strict=True))
    texts = {name: [text for _, text in answer["does"]] for name, answer in found.items()}
    assert texts["wikitext-2"] == texts["wikitext-103"] == ["".join(first[1:]), "".join(second)]
    assert texts["wikitext-2-validation"] == texts["wikitext-103-validation"] == ["".join(second)]
    assert texts["wikitext-2-test"] == texts["wikitext-103-test"] == ["no title\n \n", "".join(second)]
    assert texts["tinystories"] == rows[1:4], "of other repositories a row is a document"
    assert texts["tinystories-validation"] == ["Once ."]
    assert [id for id, _ in found["wikitext-103"]["does"]] == [f"wikitext-103/document-000000{n}" for n in (1, 2)]
    assert found["wikitext-2-test"]["does"][0][0] == "wikitext-2-test/document-0000001"
    read, written = ask(
        tmp_path,
        hub,
        ("read", {"corpus": "wikitext-2", "tokens": 12}),
        ("corpus", hubtexts.ALIASES["wikitext-2"]),
        HF_HUB_OFFLINE="1",
    )
    assert read["does"] == ["wikitext-2/document-0000001", "wikitext-2/document-0000002"]
    assert [text for _, text in written["does"]] == texts["wikitext-2"]


def test_what_the_hub_cannot_give_is_said_in_words_and_without_the_token(hub, shards, tmp_path):
    table(shards / "body.parquet", body=["x"], label=[1])
    table(shards / "numbers.parquet", text=[1.5])
    table(shards / "nothing.parquet", text=["x", None])
    table(shards / "twice.parquet", text=["x", "y"], id=["a", "a"])
    table(shards / "blank.parquet", text=["", " \n"])
    (shards / "torn.parquet").write_bytes((shards / "blank.parquet").read_bytes()[:-9])
    (shards / "body.jsonl").write_text('{"body": "x"}\n')
    (shards / "bytes.txt").write_bytes(b"caf\xe9")
    hub.add("datasets/org/stories", shards)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("open('ran', 'w')")
    hub.add("datasets/org/code", tmp_path / "code")
    there = "blank.parquet, body.jsonl, body.parquet, bytes.txt, data/train-00000-of-00002.parquet"
    expected = {
        "hub:org/stories:data/test-*.parquet": f"stories@main has no file 'data/test-*.parquet'; there are: {there}",
        "hub:org/code:*.parquet": "org/code@main has no file '*.parquet'; there are: code.py",
        "hub:org/stories@dev:*.txt": "org/stories@dev is not there: the repository has no such branch, tag or commit",
        "hub:org/stories:body.parquet": 'body.parquet has no column "text"; there are: body, label',
        "hub:org/stories:numbers.parquet": 'numbers.parquet, row 1: expected a string under "text", got 1.5',
        "hub:org/stories:nothing.parquet": 'nothing.parquet, row 2: expected a string under "text", got None',
        "hub:org/stories:twice.parquet": "number 1 and number 2 have the same id 'a'",
        "hub:org/stories:blank.parquet": "hub:org/stories:blank.parquet holds no text: 2 documents",
        "hub:org/stories:torn.parquet": "torn.parquet is not a whole parquet file: ",
        "hub:org/stories:body.jsonl": "body.jsonl, line 1: expected a string under \"text\", got only 'body'",
        "hub:org/stories:bytes.txt": "bytes.txt is not UTF-8: byte 0xe9 at offset 3",
        "hub:org/gated:*.txt": "org/gated@main is gated: accept its licence on the hub and set HF_TOKEN",
        "hub:org/missing:*.txt": "org/missing@main is not on the hub, or it is private and HF_TOKEN is not set "
        "(a corpus is looked for among datasets)",
        "hub:org/expired:*.txt": "org/expired@main was refused by the hub with status 401; is HF_TOKEN right?",
        "hub:org/broken:*.txt": "org/broken@main is not in the hub's cache, or not all of it, and the hub answers 503",
    }
    answers = ask(tmp_path, hub, *[("corpus", name) for name in expected], HF_TOKEN=SECRET, HF_DEBUG="1")
    for (name, words), answer in zip(expected.items(), answers, strict=True):
        assert words in answer["error"] and answer["value error"], (name, answer)
        assert SECRET not in json.dumps(answer)
    nowhere(tmp_path)
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path and path.endswith(".py")]
    (offline,) = ask(tmp_path, hub, ("corpus", "hub:org/stories:none.txt"), HF_HUB_OFFLINE="1")
    assert "org/stories@main has no file 'none.txt'; there are: blank.parquet, body.jsonl" in offline["error"]


def test_a_long_list_of_files_is_cut(hub, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(25):
        (folder / f"{n:02d}.txt").write_text("x")
    hub.add("datasets/org/many", folder)
    (answer,) = ask(tmp_path, hub, ("corpus", "hub:org/many:*.csv"))
    assert answer["error"].endswith("there are: " + ", ".join(f"{n:02d}.txt" for n in range(20)) + " and 5 more")


def test_without_hub_and_cache_the_error_says_which_of_them_is_missing(hub, shards, tmp_path):
    hub.add("datasets/org/stories", shards)
    (offline,) = ask(tmp_path, hub, ("corpus", TRAIN), HF_HUB_OFFLINE="1")
    hub.close()
    (down,) = ask(tmp_path, hub, ("corpus", TRAIN))
    said = "org/stories@main is not in the hub's cache, or not all of it, and "
    assert offline["error"] == f"{said}HF_HUB_OFFLINE is set"
    assert down["error"] == f"{said}no hub answers"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("hub:", "expected hub:org/name[@revision]:PATH, as in hub:Salesforce/wikitext:"),
        ("hub:org/name", "expected hub:org/name[@revision]:PATH"),
        ("hub:org/name:", "expected hub:org/name[@revision]:PATH"),
        ("hub:org/name@:x.txt", "expected hub:org/name[@revision]:PATH"),
        ("hub:/name:x.txt", "expected hub:org/name[@revision]:PATH"),
        ("hub:a/b/c:x.txt", "expected hub:org/name[@revision]:PATH"),
        ("hub:org/name:x.txt\n", "expected hub:org/name[@revision]:PATH"),
        ("hub:org/name:x.pdf", "expected a PATH that ends in .parquet, .jsonl, .csv, .txt, got 'x.pdf'"),
        ("hub:org/name:data/*", "expected a PATH that ends in"),
        ("wikitext-3", "from the hub: wikitext-2, wikitext-2-validation, "),
        ("wikitext", "tinystories, tinystories-validation, hub:org/name[@revision]:PATH"),
    ],
)
def test_a_name_that_cannot_be_meant_is_refused_with_the_form_it_should_have(name, complaint):
    with pytest.raises(ValueError) as caught:
        corpus(name)
    assert complaint in str(caught.value) and repr(name) in str(caught.value)


def test_a_name_is_taken_apart():
    assert hubtexts.source("hub:org/n.a-me@refs/convert/parquet:a:b/[x]*.jsonl") == hubtexts.Source(
        stem="n.a-me", repository="org/n.a-me", revision="refs/convert/parquet", pattern="a:b/[x]*.jsonl"
    )
    assert hubtexts.source("austen") is None and hubtexts.source("./hub.txt") is None
    for name, written in hubtexts.ALIASES.items():
        short, long = hubtexts.source(name), hubtexts.source(written)
        assert (short.repository, short.revision, short.pattern) == (long.repository, "main", long.pattern)
        assert short.stem == name and short.of_lines == name.startswith("wikitext")


@pytest.mark.parametrize("line", HEADINGS)
def test_a_title_begins_an_article(line):
    assert list(hubtexts.articles(["", " before\n", line, " after\n"])) == [" \n before\n", line + " after\n"]


@pytest.mark.parametrize("line", [*NO_HEADINGS, "", " a = b = \n"])
def test_what_is_no_title_stays_in_its_article(line):
    assert list(hubtexts.articles([" = A = \n", line, "x"])) == [" = A = \n" + (line or " \n") + "x"]


@given(st.lists(st.sampled_from([*HEADINGS, *NO_HEADINGS, "", " words .\n"]), max_size=12))
def test_articles_joined_again_are_the_raw_file(lines):
    found = list(hubtexts.articles(lines))
    raw = "".join(line or " \n" for line in lines)
    joined = "".join(found)
    assert raw.endswith(joined) and not raw[: len(raw) - len(joined)].strip()
    titles = [line for line in lines if line in HEADINGS]
    assert [article for article in found if article.startswith(tuple(HEADINGS))] == found[-len(titles) or len(found) :]
    assert len(found) - len(titles) in (0, 1)
