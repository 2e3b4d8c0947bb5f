"""Our greedy coordinate gradient against nanogcg: the same draws, the same losses, the same strings."""

import copy
import math
from types import SimpleNamespace

import nanogcg
import nanogcg.utils
import pytest
import torch

from attacks import model, naive
from lesion.flips import allowed, table
from lesion.measures import Gcg
from lesion.packaged import byte_tokenizer
from lesion.subjects import Scratch
from lesion.suffixes import Frame, search
from lesion.trial import Specimen, Trial

PROMPT, TARGET = "Tell me why. ", "Sure, here is"


def printable(may, tokenizer):
    texts = tokenizer.batch_decode([[i] for i in range(len(may))])
    return may & torch.tensor([text.isascii() and text.isprintable() for text in texts])


def theirs(monkeypatch, model, tokenizer, how, seed, may):
    """nanogcg, without its prefix cache, which breaks on this transformers, and with our list of tokens that may not be used."""
    import nanogcg.gcg as code

    for room in (code, nanogcg.utils):
        monkeypatch.setattr(
            room, "gc", SimpleNamespace(collect=lambda: None)
        )  # after every batch, which takes seconds here
    monkeypatch.setattr(code, "get_nonascii_toks", lambda tokenizer, device: (~may).nonzero()[:, 0])
    config = nanogcg.GCGConfig(
        num_steps=how.steps,
        optim_str_init=how.optim_str_init,
        search_width=how.search_width,
        topk=how.topk,
        n_replace=how.n_replace,
        buffer_size=how.buffer,
        filter_ids=how.filter_ids,
        use_prefix_cache=False,
        verbosity="ERROR",
    )
    prompt = how.pairs[0][0] if how.place == "suffix" else "{optim_str}" + how.pairs[0][0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nanogcg.run(model, tokenizer, prompt, how.pairs[0][1], config)


def ours(model, tokenizer, how, seed, may):
    """Our search, drawing from torch's stream what nanogcg draws, in its order."""
    specimen = Specimen(model=model, tokenizer=tokenizer, trial=Trial(subject=Scratch()))
    frame = how.frame(specimen, "item", *how.pairs[0])
    first = tokenizer(how.optim_str_init, add_special_tokens=False)["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.tensor([first])
        if how.buffer > 1:
            simple = torch.tensor(tokenizer(list(".,!?;:()[]{}@#$%&*wxyz"), add_special_tokens=False)["input_ids"])[
                :, 0
            ]
            start = torch.cat((start, simple[torch.randint(0, len(simple), (how.buffer - 1, len(first)))]))

        def draw(step, n, positions, choices):
            return torch.rand(n, positions), torch.randint(0, choices, (n, how.n_replace, 1)).squeeze(2)

        filtering = tokenizer if how.filter_ids else None
        return frame, search(model, frame, start, may, draw, tokenizer=filtering, **how.options())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"buffer": 3},
        {"buffer": 1, "place": "prefix"},
        {"n_replace": 2, "search_width": 17},
        {"filter_ids": False, "topk": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt-neox"])
def test_the_same_draws_give_the_strings_and_losses_of_nanogcg(family, options, dtype, monkeypatch):
    options = {"search_width": 32, "topk": 12, **options}
    how = Gcg(pairs=((PROMPT, TARGET),), optim_str_init="x x x", steps=6, chat="plain", **options)
    mine, tokenizer = model(family, dtype), byte_tokenizer()
    may = printable(allowed(tokenizer, len(table(mine))), tokenizer)
    peer = theirs(monkeypatch, mine, byte_tokenizer(), how, 5, may)
    frame, found = ours(mine, tokenizer, how, 5, may)
    assert found.losses == pytest.approx(peer.losses, rel=1e-6)
    assert tokenizer.decode(found.string) == peer.best_string
    assert found.loss == pytest.approx(peer.best_loss, rel=1e-6)
    assert found.loss == pytest.approx(naive(mine, frame.passage(found.string)), rel=1e-6)
    assert min(found.losses) < found.start


def specimen(family="tiny-llama", **config):
    return Scratch(architecture=family, config=config).load()


def asked(here, **options):
    options = {
        "pairs": ((PROMPT, TARGET),),
        "optim_str_init": "x x x",
        "steps": 4,
        "search_width": 16,
        "topk": 8,
        **options,
    }
    how = Gcg(**options)
    return list(how.read(here, how.items(here)))


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma3-text", "tiny-t5"])
def test_rows_can_be_computed_again(family):
    here = specimen(family)
    [row] = asked(here)
    before, after = (here.tokenizer(text)["input_ids"] for text in (PROMPT, ""))
    target = here.tokenizer(TARGET)["input_ids"]
    text = Frame("again", before, after, target, family == "tiny-t5").passage(row["string_ids"])
    assert row["loss"] == pytest.approx(naive(here.model, text), rel=1e-5)
    assert row["loss"] == pytest.approx(min(row["losses"]), rel=1e-5)
    assert row["outcome"] == "optimised" and row["loss"] < row["start"] and len(row["losses"]) == 4
    assert here.tokenizer.decode(row["string_ids"]) == row["string"] and row["stable"] and row["stable_in_prompt"]
    assert row["string"].isascii() and row["string"].isprintable() and 4 <= row["scored"] <= 64
    assert asked(here)[0] | {"duration": 0} == row | {"duration": 0}
    assert asked(here, seed=1)[0]["losses"] != row["losses"]


def test_the_string_stands_where_it_is_asked_to():
    here = specimen()
    for options, before, after in [
        ({}, PROMPT, ""),
        ({"place": "prefix"}, "", PROMPT),
        ({"pairs": (("one {string} two", TARGET),)}, "one ", " two"),
    ]:
        how = Gcg(**{"pairs": ((PROMPT, TARGET),), **options})
        frame = how.frame(here, "item", *how.pairs[0])
        assert (here.tokenizer.decode(frame.before), here.tokenizer.decode(frame.after)) == (before, after)
        assert frame.passage([7, 8]).tokens == (*frame.before, 7, 8, *frame.after, *frame.target)
        assert here.tokenizer.decode(frame.passage([7]).targets) == TARGET
    here.tokenizer.chat_template = "{% for m in messages %}<bos>[{{ m.content }}]{% endfor %}:"
    frame = Gcg(pairs=((PROMPT, TARGET),)).frame(here, "item", PROMPT, TARGET)
    assert here.tokenizer.decode(frame.before) == f"<bos>[{PROMPT}" and here.tokenizer.decode(frame.after) == "]:"


def test_what_cannot_be_asked_is_refused():
    here = specimen()
    with pytest.raises(ValueError, match="the target '' has no tokens"):
        asked(here, pairs=((PROMPT, ""),))
    with pytest.raises(ValueError, match="more than the context of 256"):
        asked(here, optim_str_init="x" * 250)
    with pytest.raises(ValueError, match="optim_str_init has 1 tokens, of which 2 were to be replaced"):
        asked(here, optim_str_init="x", n_replace=2)
    with pytest.raises(ValueError, match="300 candidates for a position were asked for; there are 95 allowed ids"):
        asked(here, topk=300)
    with pytest.raises(ValueError, match="chat='template' was asked for, but this tokenizer has no chat template"):
        asked(here, chat="template")
    with pytest.raises(ValueError, match="stands twice"):
        Gcg(pairs=(("a", "b"), ("a", "b")))
    with pytest.raises(ValueError, match="stands more than once"):
        Gcg(pairs=(("{string} {string}", "b"),))


def test_a_model_of_nan_is_said_to_be_one():
    here = specimen()
    with torch.no_grad():
        here.model.get_output_embeddings().weight[5] = math.nan
    [row] = asked(here)
    assert row["outcome"] == "not finite" and row["loss"] is None and row["start"] is None and row["losses"] == []
    assert Gcg(pairs=((PROMPT, TARGET),)).summarise([row]) == {
        "loss": None,
        "start": None,
        "stable": None,
        "not_finite": 1,
    }


def test_a_token_that_says_the_target_is_found():
    """Planted: behind one token, and no other, the head answers with the target."""
    here = specimen(tie_word_embeddings=False)
    key, answer = (here.tokenizer(text)["input_ids"][0] for text in ("Q", "Z"))
    with torch.no_grad():
        rows, head = here.model.get_input_embeddings().weight, here.model.get_output_embeddings().weight
        stream = torch.Generator().manual_seed(0)
        direction = torch.randn(rows.shape[1], generator=stream)
        rows[key] = direction
        head[answer] = direction
    [row] = asked(here, pairs=(("go ", "Z"),), steps=6, search_width=64, topk=16)
    assert row["string"].endswith("Q") and row["loss"] < row["start"] - 1


def test_nothing_of_ours_moves_the_global_stream():
    here = specimen()
    before = torch.random.get_rng_state().clone()
    asked(copy.copy(here))
    assert torch.equal(before, torch.random.get_rng_state())
