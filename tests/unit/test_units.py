"""Content units: descriptions that hold one, that deny it, and that only use its words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesion.units import UNITS, found

# unit → what mentions it, what does not
CASES: dict[str, tuple[list[str], list[str]]] = {
    "boy": (
        ["A boy is here.", "Her BROTHER laughs.", "two boys", "The lad’s shirt is striped.", "The woman does not notice the boy."],
        ["There is no boy.", "I cannot see any little boy.", "A cowboyish hat", "The girl has neither a brother nor a cat.", "It is not a boy."],
    ),
    "jar": (
        ["a jar", "the cookie jar's lid", "JARS of jam", "He opens a biscuit tin."],
        ["The door is ajar.", "without a jar", "There isn't any cookie jar.", "a jarring noise"],
    ),
    "taking cookies": (
        ["He is taking cookies.", "A boy reaches into the jar for a cookie.", "stealing some biscuits", "Two cookies were stolen", "getting a treat", "a cookie theft"],
        ["He is not taking any cookies.", "Cookies are nice.", "She takes a plate.", "She takes a plate. Cookies lie about.", "He never steals cookies", "He takes plates, not cookies."],
    ),
    "where the jar is": (
        ["The jar stands in the cupboard.", "He takes cookies from the top shelf.", "In the cabinet there is a jar.", "a larder full of biscuits"],
        ["The jar is on the table.", "The cupboard is green.", "There is no jar in the cupboard.", "The cookies are not in the cupboard.", "The cupboard is open. The jar is full."],
    ),
    "stool": (
        ["a stool", "Three-legged STOOLS", "a footstool", "on a step-stool", "up on a chair"],
        ["no stool", "toadstools grow", "It's not a stool.", "a tool"],
    ),
    "boy on stool": (
        ["The boy is standing on a stool.", "He climbed onto the wobbly chair.", "a boy on top of a tall stool", "A child balances on the stool", "the stool the boy is standing on", "The stool under the boy's feet"],
        ["The boy is not on the stool.", "The girl is on the stool.", "The boy watches while the girl stands on a stool.", "The boy is next to the stool.", "There is a boy. A cup is on the stool.", "No boy is standing on a stool."],
    ),
    "stool tipping": (
        ["The stool is tipping over.", "his chair wobbles", "an unsteady three-legged stool", "The stool is about to fall over", "He tips over the stool"],
        ["The stool is not tipping.", "The stool stands firmly.", "A jug tips over.", "The sink runs over. A stool is there.", "the stool never wobbles"],
    ),
    "falling or hurt": (
        ["The boy is about to fall.", "He might get hurt.", "He is losing his balance.", "a child tumbling down", "falling off the stool", "Nobody sees that the boy is falling.", "They're in danger of falling."],
        ["The boy is not falling.", "Water is falling on the floor.", "Cookies fall from the jar.", "a waterfall", "in the fall", "The boy will never fall."],
    ),
    "girl": (
        ["A girl", "his little sister", "the GIRLS", "her daughter's dress"],
        ["no girl", "There's a boy but not a girl.", "girlish", "I don't see a girl.", "neither boy nor girl"],
    ),
    "girl reaching": (
        ["The girl is reaching up.", "His sister stretches out her hand", "The girl, in a yellow dress, holds up one hand", "She reaches up for a cookie.", "a girl asking for a cookie", "The girl with the two long plaits puts a finger to her lips while reaching for more", "A girl laughs. She asks her brother for one."],
        ["The girl is not reaching.", "The boy is reaching up.", "The girl watches the boy reach up.", "She reaches for the plate.", "A girl is here. The boy reaches up."],
    ),
    "shushing": (
        ["She is shushing him.", "A finger to her lips", "Her lips are covered by one finger", "telling her brother to be quiet", "Shhh!", "The girl gestures for silence"],
        ["She is not shushing him.", "She has a ring on her finger.", "a quiet kitchen", "Her lips are red.", "The finger is not at her lips.", "the rush hour"],
    ),
    "girl happy": (
        ["The girl is smiling.", "a happy little girl", "His sister laughs out loud", "The children are giggling.", "a girl with a big grin"],
        ["The girl is not happy.", "The girl isn't smiling.", "The woman is smiling.", "The girl looks at the smiling woman.", "a girl and a boy who smiles", "The boy is happy."],
    ),
    "woman": (
        ["A woman", "the mother's apron", "his mum", "a LADY", "Women cook."],
        ["no woman", "There isn't a mother here.", "womanly", "smother", "without their mother"],
    ),
    "washing or drying": (
        ["She is washing up.", "She dries a plate.", "wiping it with a cloth", "scrubbed pots", "to do the dishes", "the plate she has cleaned"],
        ["She is not washing anything.", "a washing machine", "a dry floor", "a clean kitchen", "nor does she wipe it", "Nobody is drying a plate."],
    ),
    "sink": (
        ["the sink", "two sinks", "a full wash basin", "She doesn't see the sink overflow."],
        ["no sink", "The ship is sinking.", "There isn't a sink.", "sank"],
    ),
    "overflowing": (
        ["The sink is overflowing.", "It overflowed", "Water spills everywhere", "the tap is flooding the room", "water runs over the edge", "pouring out water"],
        ["The sink is not overflowing.", "The sink is full.", "Cookies spill from the jar.", "The water has never overflowed.", "over the hills", "no flood"],
    ),
    "water on floor": (
        ["water on the floor", "a puddle", "The floor is wet.", "It spills onto the tiles", "a pool of water", "flooding the kitchen"],
        ["There is no water on the floor.", "The floor is dry.", "water in the sink", "The boy stands near the water while a cat lies on the floor.", "no puddle", "Water is in the sink. The floor is tiled."],
    ),
    "kitchen": (
        ["a kitchen", "The KITCHEN's walls", "in their kitchens"],
        ["This is not a kitchen.", "chicken", "no kitchen", "kit"],
    ),
    "window": (
        ["a window", "WINDOWS", "on the windowsill", "She looks out of the window."],
        ["There is no window.", "I can't see a window", "windy", "a widow"],
    ),
    "curtains": (
        ["red curtains", "a curtain", "The drapes are tied back"],
        ["no curtains", "a window without curtains", "certain", "There aren't any curtains."],
    ),
    "outside": (
        ["Outside it is sunny", "a garden", "You can see trees", "the back yard behind a fence"],
        ["There is no garden.", "inside", "a gardener", "You cannot see the outside.", "one-sided"],
    ),
    "dishes": (
        ["dishes", "a stack of plates", "two cups", "She doesn't notice the dishes.", "mugs and bowls"],
        ["no dishes", "a dish towel", "dishwasher", "platelets", "There aren't any plates or cups."],
    ),
}  # fmt: skip

WHOLE = """This picture shows a busy kitchen. On the left, a woman in an apron is drying a plate with a towel while the sink
in front of her overflows; water pours over the edge and has formed a large puddle on the floor. She doesn't seem to see
it, because she looks out of the window. Behind the red curtains you can see a garden with an apple tree.

- On the right a boy with red hair is standing on a wooden stool, and the stool is tipping over, so that he is about to
  fall. He is taking cookies out of a big jar in the cupboard.
- In the middle, a girl is reaching up for a cookie. She holds a finger to her lips. The girl is grinning.

Clean dishes are stacked on the counter, and a grey cat sits beside the water."""

UNRELATED = [
    "Paris is the capital of France, and the Seine flows through it.",
    "The answer is 42, because 6 times 7 is 42.",
    "I came. I saw. I won. I won. I won.",
    "Stock prices rose on Monday after the bank had lowered its rate.",
    "def f(x): return x + 1",
    "\ufffd\x00 ## 12;;; ...",
    "",
    " \n\n ",
]


def test_there_are_22_units_and_each_has_its_cases() -> None:
    assert len(UNITS) == 22 and list(CASES) == list(UNITS)
    assert all(len(right) >= 3 and len(wrong) >= 3 for right, wrong in CASES.values())


@pytest.mark.parametrize("unit", UNITS)
def test_mentions(unit: str) -> None:
    right, wrong = CASES[unit]
    assert [text for text in right if not found(text)[unit]] == []
    assert [text for text in wrong if found(text)[unit]] == []


@pytest.mark.parametrize("unit", UNITS)
def test_a_mention_is_found_within_much_talk_and_a_denied_one_is_not(unit: str) -> None:
    talk = " ".join(UNRELATED[:4])
    right, wrong = CASES[unit]
    assert [text for text in right if not found(f"{talk}\n\n{text.upper()}\n\n{talk}")[unit]] == []
    assert [text for text in wrong if found(f"{talk}\n\n{text}\n\n{talk}")[unit]] == []
    assert found(f"{wrong[0]}. {right[0]}")[unit] and found(f"{right[0]}. {wrong[0]}")[unit]


def test_a_whole_description_has_all_of_them() -> None:
    assert [unit for unit, there in found(WHOLE).items() if not there] == []
    assert found(WHOLE.replace("\n", " ")) == found(WHOLE)  # but for the bullets, lines are only wrapped


@pytest.mark.parametrize("text", UNRELATED)
def test_unrelated_text_has_none(text: str) -> None:
    assert found(text) == dict.fromkeys(UNITS, False)


@pytest.mark.parametrize(
    ("text", "happy"),
    [
        ("A girl reaches up. She is smiling.", True),
        ("The girl stands behind the woman. She giggles.", True),
        ("A girl is there. It is noisy. She's laughing.", True),
        ("A woman is at the sink. She is smiling.", False),
        ("The woman does not see the girl. She is smiling.", False),
        ("A girl is there. She is not smiling.", False),
        ("She is smiling.", False),
    ],
)
def test_she_is_who_was_named_first_before(text: str, happy: bool) -> None:
    assert found(text)["girl happy"] is happy


def test_the_share_of_a_poor_description() -> None:
    poor = "I see a woman and a boy. There is no girl. It could be a kitchen."
    assert [unit for unit, there in found(poor).items() if there] == ["boy", "woman", "kitchen"]


@given(st.lists(st.sampled_from([*WHOLE.split(), "no", "not", "."]), max_size=60))
def test_any_text_has_an_answer_for_each_unit_and_case_does_not_matter(words: list[str]) -> None:
    text = " ".join(words)
    assert list(found(text)) == list(UNITS)
    assert found(text) == found(text.upper()) == found(f"  {text}\n")


@pytest.mark.parametrize(
    "text", ["the boy " * 3000, "no boy " * 3000, "reach a b c d e f " * 1000, "x" * 50_000, "n't " * 5000]
)
def test_long_loops_take_no_time(text: str) -> None:
    assert set(found(text)) == set(UNITS)
