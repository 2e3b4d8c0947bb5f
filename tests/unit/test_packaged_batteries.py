"""The packaged batteries and the picture: what they hold, that every key can be met and missed, and what is refused."""

from __future__ import annotations

import hashlib
import runpy
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from lesion import batteries as module
from lesion.batteries import Prompt, batteries, battery, grade, picture, picture_digest
from lesion.units import found

SMALL, IQ = battery("small"), battery("iq")
KEYED = [prompt for prompt in SMALL + IQ if prompt.answer is not None]


# ---- batteries ------------------------------------------------------------------------------------------------------


def test_the_small_battery_has_eight_prompts_of_each_kind() -> None:
    groups = ["arithmetic", "language", "logic", "factual", "open"]
    assert [p.id for p in SMALL] == [f"{g}-{n:02d}" for g in groups for n in range(1, 9)]
    assert all(p.id.startswith(p.group) for p in SMALL)
    assert len({p.text for p in SMALL}) == 40 and all(len(p.text) < 120 for p in SMALL)
    assert {p.group for p in SMALL if p.answer is None} == {"open"}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("iq", {"math": 30, "language": 20, "logic": 12, "factual": 12, "creativity": 8}),
        ("dreams", {"dreams": 38}),
        ("picture", {"picture": 20}),
    ],
)
def test_the_batteries_of_the_degrade_study(name: str, groups: dict[str, int]) -> None:
    prompts = battery(name)
    assert [p.id for p in prompts] == [f"{g}-{n:02d}" for g, count in groups.items() for n in range(1, count + 1)]
    assert all(p.id == f"{p.group}-{p.id[-2:]}" for p in prompts)
    assert len({p.text.casefold() for p in prompts}) == len(prompts) and all(len(p.text) < 130 for p in prompts)
    assert {p.group for p in prompts if p.answer is None} == groups.keys() & {"creativity", "dreams", "picture"}
    assert {p.image for p in prompts} == ({"kitchen"} if name == "picture" else {None})
    assert {p.text for p in prompts}.isdisjoint(
        p.text for other in batteries() if other != name for p in battery(other)
    )


def test_the_packaged_names_and_that_every_grader_is_used_by_both() -> None:
    assert batteries() == ["dreams", "iq", "picture", "picture-told", "small"]
    for prompts, keys in ((SMALL, 32), (IQ, 74)):
        answers = [p.answer for p in prompts if p.answer]
        assert len(answers) == keys and {k for a in answers for k in a if k in module.KEYS} == set(module.KEYS)


def right_and_wrong(prompt: Prompt) -> tuple[str, list[str]]:
    """The shortest right reply, and short wrong ones."""
    match prompt.answer:
        case {"number": value}:
            return str(value), [str(value + 1), str(10 * value), f"-{value}"]
        case {"any": [word, *_]}:
            return word, ["xylophone", f"x{word}x"]
        case {"yes": yes}:
            return ("Yes", ["No"]) if yes else ("No", ["Yes"])
        case {"choice": choice, "of": options}:
            return choice, [option for option in options if option != choice]
    raise AssertionError(prompt)


@pytest.mark.parametrize("prompt", KEYED, ids=lambda p: p.id)
def test_every_key_knows_its_answer_and_refuses_what_is_wrong_nothing_noise_echo_and_loops(prompt: Prompt) -> None:
    word, others = right_and_wrong(prompt)
    told = "Sure! This is a nice question, and I am happy to help you with it. {} I hope that this helps."
    for reply in (word, f"{word}.", f"**{word}**", f"The answer is {word}.", f"{prompt.text}\n{word}"):
        assert grade(prompt, reply) is True, reply
        assert grade(prompt, told.format(reply if reply.endswith(".") else f"{reply}.")) is True, reply
    for other in others:
        for reply in (
            other,
            f"{other}.",
            f"The answer is {other}.",
            f"{prompt.text}\n{other}",
            told.format(f"{other}."),
        ):
            assert grade(prompt, reply) is False, reply
    wrong = ("", " \n", "I", "the of and", prompt.text, f"{prompt.text} {prompt.text}", f"{word} " * 30, "\ufffd\x00")
    for reply in (*wrong, told.format(""), f"{word}. " + "I hope that this helps. " * 5):
        assert grade(prompt, reply) is False, reply


@pytest.mark.parametrize(
    ("id", "reply", "right"),
    [
        ("math-10", "18 / 3 = 6, then 5 + 6 = 11, and 11 - 4 = 7.", True),
        ("math-10", "5 + 18 = 23, 23 / 3 = 7.67, 7.67 - 4 = 3.67", False),
        ("math-12", "41, 42, 43, 44, 45", True),
        ("math-11", "10, 20, 30, 40, 50, 60, 70", True),
        ("math-11", "The sequence goes up by 10.", False),
        ("math-14", "78, because each number is 3 less than the one before.", True),
        ("math-20", "25% of 80 is 20.", True),
        ("math-19", "Fifteen, since 20 / 4 = 5 and 3 * 5 = 15.", True),
        ("math-22", "x + 6 - 6 = 15 - 6, so x = 9", True),
        ("math-23", "Divide both sides by 3: x = 24 / 3 = 8.", True),
        ("math-26", "4 tickets cost 4 * 7 = 28 euros.", True),
        ("math-27", "12 + 5 = 17 and 17 - 3 = 14, so there are 14 people on the bus.", True),
        ("math-27", "There are 12 people on the bus.", False),
        ("math-28", "There are 60 minutes in an hour, so 2 hours have 2 x 60 = 120 minutes.", True),
        ("math-30", "85 is bigger than 58.", True),
        ("language-01", "The opposite of hot is cold.", True),
        ("language-05", "Apple, banana and cherry are fruits, but hammer is a tool.", True),
        ("language-05", "The word that does not belong is banana.", False),
        ("language-10", "The letter after F is G.", True),
        ("logic-07", "Tom is the tallest, as he is taller than Ben.", True),
        ("logic-07", "Sam", False),
        ("logic-08", "Mia is younger than Leo.", True),
        ("logic-06", "No, it is not raining, as the street is dry.", True),
        ("factual-03", "A pentagon has five sides and five angles.", True),
        ("factual-05", "A leap year has 366 days, one more than the 365 of other years.", True),
        ("factual-12", "Water boils at 100°C (212°F).", True),
        ("factual-09", "Plants take in oxygen.", False),
    ],
)
def test_replies_to_the_iq_battery_as_a_careful_reader_grades_them(id: str, reply: str, right: bool) -> None:
    (prompt,) = (prompt for prompt in IQ if prompt.id == id)
    assert grade(prompt, reply) is right


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_the_packaged_picture_is_a_small_rgb_png_that_is_the_one_that_was_pinned() -> None:
    content = picture("kitchen")
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) < 250_000
    width, height, depth, colours = struct.unpack(">IIBB", content[16:26])
    assert (width, height, depth, colours) == (900, 675, 8, 2)  # colour type 2 is RGB
    assert picture_digest("kitchen") == hashlib.sha256(content).hexdigest()


def test_a_changed_or_unknown_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"no picture 'attic'; packaged: kitchen; or give the path of a .* \.jpeg file"
    ):
        picture("attic")
    (tmp_path / "kitchen.png").write_bytes(picture("kitchen")[:-1])
    monkeypatch.setattr(module, "PICTURES", replace(module.PICTURES, folder=tmp_path))
    with pytest.raises(ValueError, match="packaged picture 'kitchen' is damaged"):
        picture("kitchen")


def test_a_users_battery_may_name_the_packaged_picture_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a cat")
    own = str(tmp_path / "cat.jpg")
    (tmp_path / "b.csv").write_text(f"prompt,image\nWhat is it?,{own}\nAnd this?,kitchen\nWhy?,\n")
    assert [p.image for p in battery(str(tmp_path / "b.csv"))] == [own, "kitchen", None]
    assert picture(own) == b"a cat" and picture_digest(own) == hashlib.sha256(b"a cat").hexdigest()


def test_drawing_the_kitchen_again_gives_the_packaged_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py", reason="the drawing tool needs resvg-py")
    tools = Path(__file__).parents[2] / "tools"
    monkeypatch.syspath_prepend(str(tools))
    drawing = runpy.run_path(str(tools / "draw_kitchen.py"))["drawing"]()
    assert drawing == (module.DATA / "pictures" / "kitchen.svg").read_text(encoding="utf-8")


def test_the_told_picture_holds_all_that_the_drawing_shows():
    """So that a model without eyes can be asked the same, and be scored by the same units."""
    told, shown = battery("picture-told"), battery("picture")
    assert len(told) == len(shown) == 20 and {p.group for p in told} == {"picture"}
    for without, with_it in zip(told, shown, strict=True):
        assert without.text.endswith(with_it.text) and without.image is None and with_it.image == "kitchen"
        assert all(found(without.text).values())
