"""The command line as a person meets it: every command, every exit code, and one clear line for whatever is wrong."""

import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lesion import cli, commands
from lesion.store import Store

SRC = str(Path(cli.__file__).parents[1])
SMALL = [
    "--measures",
    "perplexity",
    "generation",
    "--prompts",
    "4",
    "--new-tokens",
    "6",
    "--documents",
    "2",
    "--tokens",
    "40",
    "--repeats",
    "2",
]
LLAMA = ["degrade", "--subject", "tiny-llama", *SMALL, "--site", "mlp", "--doses", "0", "0.3"]
NEOX = [
    "degrade",
    "--subject",
    "tiny-gpt-neox",
    *SMALL,
    "--site",
    "attention.value",
    "--method",
    "ablation",
    "--doses",
    "0.5",
]
PATIENCE = 600  # seconds; nothing here takes more than a few, unless the machine is very busy
READINGS = 1 + 2 + 2 + 2  # perplexity of the undamaged model once, of the damaged ones by seed; generations by seed


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def lesion(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty directory, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LESION_LAB", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def call(*words):
        capsys.readouterr()
        try:
            code = cli.run([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Said(code, *capsys.readouterr())

    return call


def process(*words, **more):
    """The same in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    line = [sys.executable, *more.pop("python", ["-m", "lesion.cli"]), *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A lab with one small study in it, made as a user makes it, and what was said."""
    path = tmp_path_factory.mktemp("taken")
    done = process("run", *LLAMA, "--threads", 1, cwd=path)
    out, err = done.communicate(timeout=PATIENCE)
    return path / "lab", Said(done.returncode, out, err)


@pytest.fixture
def lab(taken, tmp_path):
    return Path(shutil.copytree(taken[0], tmp_path / "lab"))


def key_of(lab, word):
    """Key of the state whose sentence holds a word."""
    (key,) = (k for k, s in Store(lab).index.states.items() if word in json.dumps(s["trial"]["steps"]))
    return key


def files(path):
    return {p: p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------- run, plan, report


def test_a_run_answers_and_says_where(taken):
    lab, said = taken
    assert said.code == 0
    assert "How does tiny-llama fail under mult-gauss of mlp?" in said.out
    assert re.search(r"^mlp +0\.3 .*\[.*\]", said.out, re.MULTILINE)
    page = lab.parent / re.search(r"^report: (.*)$", said.out, re.MULTILINE)[1]
    assert page.read_text().startswith("<!")
    assert f"{READINGS} of {READINGS} readings in" in said.err


def test_what_is_no_terminal_gets_plain_lines(taken):
    _, said = taken
    assert not re.findall(r"[^\n\x20-\x7e\x80-\U0010ffff]", said.out + said.err)
    assert re.search(r"^0/7 readings · starting · [\d.]+ GiB · loading scratch$", said.err, re.MULTILINE)
    assert all(line == line.rstrip() for line in said.err.splitlines())


def test_each_run_has_a_log_beside_its_segment(taken):
    (segment,), (log,) = (list((taken[0] / "log").glob(f"*.{end}")) for end in ("jsonl", "log"))
    assert segment.stem == log.stem
    text = log.read_text()
    assert '"subject": "tiny-llama"' in text and "noise(site=mlp, sigma=0.3, seed=43) | generation(" in text


def test_the_same_command_again_has_nothing_to_do_and_writes_nothing_into_the_log(lab, lesion):
    before = files(lab)
    said = lesion("run", *LLAMA)
    assert said.code == 0 and said.err == f"nothing to do: {READINGS} of {READINGS} readings are in the lab already\n"
    assert "How does tiny-llama fail" in said.out
    assert files(lab) == before, "not even the report changes"


def test_asking_for_more_costs_only_that(lab, lesion):
    said = lesion("run", *LLAMA, "0.6", "--verbosity", "verbose")
    assert said.code == 0 and f"{READINGS} of {READINGS + 4} readings are in the lab already" in said.err
    assert "noise(site=mlp, sigma=0.6, seed=42)" in said.err and "sigma=0.3" not in said.err.split("are in the lab")[1]


def test_plan_run_and_report_understand_the_same_line(lesion, tmp_path):
    line = [*NEOX, "--lab", "there", "--threads", "1", "--device", "cpu", "--verbosity", "quiet"]
    said = lesion("plan", *line)
    assert said.code == 0 and not (tmp_path / "there").exists(), "a plan writes nothing"
    assert "1 states" not in said.out and re.search(r"^states +3, of which 3 must be visited$", said.out, re.MULTILINE)
    assert re.search(
        r"^readings +3 of perplexity \(3 to take\), 4 of generation \(4 to take\)$", said.out, re.MULTILINE
    )
    assert re.search(r"^time +about \d+ s \(guessed", said.out, re.MULTILINE)
    assert re.search(r"^memory +about \d+ MiB: weights \d+ KiB", said.out, re.MULTILINE)
    assert lesion("run", *line).code == 0
    assert "time       nothing to do" in lesion("plan", *line).out
    forced = lesion("plan", *line, "--force").out
    assert "(4 to take)" in forced and "from readings taken in this lab" in forced
    assert lesion("report", *line, "--force").code == 0


def test_quiet_normal_and_verbose(lab, lesion):
    quiet, normal, verbose = (lesion("run", *LLAMA, "--force", "--verbosity", v) for v in cli.VERBOSITY)
    assert quiet.err == "" and quiet.out.startswith("site") and "report: " in quiet.out and "→" not in quiet.out
    assert "How does" in normal.out and "readings in" in normal.err and "sigma" not in normal.err
    assert "noise(site=mlp, sigma=0.3, seed=42) | perplexity(" in verbose.err
    assert not logging.getLogger("lesion").handlers, "a run leaves no handlers behind"


def test_force_takes_everything_again_and_the_new_take_counts(lab, lesion):
    said = lesion("run", *LLAMA, "--force")
    assert said.code == 0 and f"{READINGS} of {READINGS} readings in" in said.err
    assert {seal.take for seal in Store(lab).index.seals.values()} == {1}


def test_a_report_of_nothing_is_refused_and_one_of_a_part_says_so(lab, lesion):
    none = lesion("report", *NEOX)
    assert none.code == 2 and "none of the 7 readings" in none.err and "lesion run degrade" in none.err
    assert lesion("report", *LLAMA, "--lab", "nowhere").code == 2 and not Path("nowhere").exists()
    part = lesion("report", *LLAMA, "0.6")
    assert part.code == 1 and "4 of 11 readings are missing" in part.out


def test_the_lab_is_that_of_the_option_then_of_the_environment(lesion, tmp_path, monkeypatch):
    odd = tmp_path / "my “lab” of [bold]größe[/] 日本"
    monkeypatch.setenv("LESION_LAB", str(odd))
    assert lesion("run", *LLAMA).code == 0 and (odd / "log").is_dir()
    assert lesion("run", "--lab", tmp_path / "other", *LLAMA).code == 0 and (tmp_path / "other" / "log").is_dir()
    said = lesion("status")
    assert said.code == 0 and said.out.startswith(f"{odd}: 3 states, {READINGS} readings")
    assert not (tmp_path / "lab").exists()


def test_what_fails_is_shown_and_the_rest_is_done(lesion, tmp_path):
    prompts = [{"id": "short", "prompt": "Hi?"}, {"id": "long", "prompt": "word " * 80}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    said = lesion("run", *LLAMA, "--battery", "b.jsonl")
    text = "ValueError: the prompt of item 'long#0' has 400 tokens, which with 6 new ones exceeds the context of 256"
    assert said.code == 1
    assert said.err.count(f"failed: {text}\n") == 1 and f"4 failures: {text}\n" in said.err
    assert (
        "3 of 7 readings in" in said.err
        and f"4 of 7 readings failed (the same command tries them again): {text}" in said.out
    )
    status = lesion("status")
    failed = re.findall(r"^  failed: (\w+): (.*)$", status.out, re.MULTILINE)
    assert status.code == 0 and [error for _, error in failed] == [text] * 4
    assert "Traceback" in lesion("show", failed[0][0]).out
    again = lesion("run", *LLAMA, "--battery", "b.jsonl")
    assert again.code == 1 and "3 of 7 readings are in the lab already" in again.err


def test_a_failure_under_force_is_a_failure_though_there_is_an_older_take(lab, lesion, monkeypatch):
    from lesion.measures.perplexity import Perplexity

    def broken(self, specimen, items):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Perplexity, "read", broken)
    said = lesion("run", *LLAMA, "--force")
    assert said.code == 1 and "failed: RuntimeError: no luck" in said.err and "missing" not in said.out


# ---------------------------------------------------------------------- status, show, export


def test_status_lists_what_there_is(lab, lesion):
    said = lesion("status")
    rows = 3 * 2 + 4 * 4
    assert said.code == 0 and said.out.startswith(f"lab: 3 states, {READINGS} readings, {rows} rows, ")
    assert "  generation: 4 readings, " in said.out and "  perplexity: 3 readings, " in said.out
    key = key_of(lab, '"seed": 43')
    sentence = "scratch(architecture=tiny-llama, seed=0, dtype=float32) >> noise(site=mlp, sigma=0.3, law=multiplicative, seed=43)"
    assert f"  {key[:12]}  2 taken of {sentence}\n" in said.out
    assert key[:12] not in lesion("status", "--verbosity", "quiet").out


def test_show_takes_the_beginning_of_any_key(lab, lesion):
    key = key_of(lab, '"seed": 43')
    said = lesion("show", key[:10])
    assert said.code == 0
    state = json.loads(said.out[: said.out.index("\n}\n") + 3])
    assert state["state"] == key and state["ledger"][1]["facts"]["parameters"] > 0
    readings = re.findall(r"^reading (\w+)  measure/(\w+): ", said.out, re.MULTILINE)
    assert sorted(name for _, name in readings) == ["generation", "perplexity"]
    for reading, name in readings:
        said = lesion("show", reading)
        assert said.code == 0 and f'"is": "measure/{name}"' in said.out
        assert said.out.count("arithmetic-01#0" if name == "generation" else "austen/chapter-01") == 1


def test_what_a_model_wrote_cannot_steer_the_terminal(lab, lesion):
    (segment,) = (lab / "log").glob("*.jsonl")
    text = re.sub(
        r'"text":"(?:[^"\\]|\\.)*"', r'"text":"\\u001b[31m[red]x[/red]\\n\\u202e\\u0007"', segment.read_text()
    )
    segment.write_text(text)
    key = next(k for k, s in Store(lab).index.seals.items() if s.measure["is"] == "measure/generation")
    said = lesion("show", key)
    assert r"⟨U+001B⟩[31m[red]x[/red]\n⟨U+202E⟩⟨U+0007⟩" in said.out and "\x1b" not in said.out


def test_rows_go_to_a_file_or_to_the_terminal(lab, lesion):
    said = lesion("export", "rows", "out.jsonl")
    assert said.code == 0 and said.out == "wrote out.jsonl\n"
    text = Path("out.jsonl").read_text()
    assert lesion("export", "rows", "-").out == text
    kinds = [json.loads(line)["is"] for line in text.splitlines()]
    assert (kinds.count("row"), kinds.count("seal"), kinds.count("state")) == (22, READINGS, 3)
    assert list(Path().glob(".*")) == []


@pytest.mark.parametrize("word", ['"steps": []', '"seed": 43'])
def test_a_state_becomes_a_transformers_directory_with_just_these_weights(lesion, tmp_path, word):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lesion import Reading
    from lesion.digest import combined, digests
    from lesion.steps import Noise
    from lesion.subjects import Scratch

    assert lesion("run", *LLAMA[:3], *SMALL, "--site", "embedding", "--doses", "0.3").code == 0
    intact = Scratch(architecture="tiny-llama").load()
    index = Store("lab").index
    (key,) = (
        (k for k, s in index.states.items() if word in json.dumps(s["trial"]))
        if "seed" in word
        else (intact.trial.key,)
    )
    before = files("lab")
    assert lesion("export", key[:12], tmp_path / "out").code == 0
    assert files("lab") == before
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if "seed" in word:
        Noise(site="embedding", sigma=0.3, seed=43).apply(intact)
    for (name, there), (other, here) in zip(model.named_parameters(), intact.model.named_parameters(), strict=True):
        assert name == other and torch.equal(there, here), name
    names = [name for name, _ in model.named_parameters()]
    assert combined(digests(model, names)) == combined(digests(intact.model, names))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")("Hi there?")["input_ids"]])
    torch.testing.assert_close(model.eval()(ids).logits, intact.model(ids).logits)
    assert json.loads((tmp_path / "out" / "ledger.json").read_text()) == index.states[key]["ledger"]
    assert Reading  # the folder is a subject again
    assert lesion("plan", *LLAMA[:1], "--subject", "./out", *SMALL).code == 0


def test_a_state_that_comes_out_differently_is_not_exported(lab, lesion):
    (segment,) = (lab / "log").glob("*.jsonl")
    key = key_of(lab, '"seed": 43')
    after = Store(lab).index.states[key]["ledger"][-1]["after"]
    segment.write_text(segment.read_text().replace(after, "0" * 32))
    said = lesion("export", key, "out")
    assert said.code == 2 and f"{after} here, but {'0' * 32} was read" in said.err
    assert sorted(p.name for p in Path().iterdir()) == ["lab"]


@pytest.mark.parametrize("what", ["rows", "state"])
def test_nothing_is_overwritten_by_an_export(lab, lesion, what):
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    before = files(Path())
    for target in ("file", "folder", "link", "no/such/folder"):
        said = lesion("export", key_of(lab, '"seed": 43') if what == "state" else "rows", target)
        assert said.code == 2 and said.out == ""
        assert (
            "no folder no/such" if "no/" in target else f"{target} exists already; nothing was overwritten"
        ) in said.err
    assert files(Path()) == before and not any(Path("folder").iterdir())


# ---------------------------------------------------------------------- wrong input

WRONG = {
    "--site mpl": r"no site 'mpl' in llama; there are: embedding, attention, .*mlp\.out",
    "--site mlp@9": r"no layer 9 .*there are: 0-1",
    "--site mlp,embedding": r"malformed site 'mlp,embedding'",
    "--site attention mpl": r"no site 'mpl'",
    "--method zap": r"--method should be 'mult-gauss', .* or 'quant-channel', not 'zap'",
    "--method ablate-heads": r"needs a site within attention",
    "--subject nope": r"no subject 'nope'; there are: smollm2, tiny, tiny-llama, ",
    "--subject ./nope": r"no folder nope",
    "--battery nope": r"no battery 'nope'; packaged: dreams, iq, picture, picture-told, small",
    "--battery nope.jsonl": r"no file 'nope.jsonl' for a battery; packaged: dreams, iq, picture, picture-told, small",
    "--battery none.jsonl": r"none.jsonl holds no prompts",
    "--battery empty.jsonl": r"empty.jsonl, line 1: prompt 'empty/prompt-001' has no text",
    "--battery broken.jsonl": r"broken.jsonl, line 2: not JSON",
    "--tier small": r"a tier is of a preset: name one of dreams, iq, picture",
    "--preset zap": r"--preset should be 'none', 'dreams', 'iq' or 'picture', not 'zap'",
    "--each head --site mlp": r"'mlp' has no heads to be damaged one by one",
    "--judges j": r"judges are asked over the network: name a judge_endpoint",
    "--corpus nope": r"no corpus 'nope'; packaged: austen",
    "--corpus empty.txt": r"empty.txt holds no text",
    "--doses -0.1": r"sigma should be greater than or equal to 0, not -0.1",
    "--doses nan": r"--doses should be a finite number, not 'nan'",
    "--doses inf": r"--doses should be a finite number, not 'inf'",
    "--doses 1e400": r"--doses should be a finite number",
    "--doses lots": r"--doses should be a valid number, not 'lots'",
    "--doses 0.1 0.1": r"a dose is named twice",
    "--doses": r"argument --doses: expected at least one argument",
    "--method ablation --doses 1.5": r"share should be less than or equal to 1, not 1.5",
    "--method uni-quant --doses 1": r"levels should be greater than or equal to 2, not 1",
    "--method uni-quant --doses 2.5": r"uni-quant takes a whole number of levels, not 2.5",
    "--new-tokens 0": r"--new-tokens should be greater than or equal to 1, not '0'",
    "--repeats 1.5": r"--repeats should be a valid integer, not '1.5'",
    "--seed -1": r"--seed should be greater than or equal to 0, not '-1'",
    "--temperature nan": r"--temperature should be a finite number",
    "--top-p 0": r"--top-p should be greater than 0",
    "--stride 512": r"a stride of 512 leaves tokens of a window of 512 without history",
    "--dtype int8": r"--dtype should be 'auto', .*, not 'int8'",
    "--lab file": r"expected a directory, but file is a file",
    "--lab file/lab": r"expected a directory, but file is a file",
    "--lab=": r"argument --lab: expected a directory, got nothing",
    "--device tpu": r"no device 'tpu' on this machine; there are: cpu",
    "--threads -1": r"expected a whole number from 0, not '-1'",
    "--verbosity loud": r"invalid choice: 'loud' \(choose from '?quiet'?, '?normal'?, '?verbose'?\)",
    "--dose 1": r"no option --dose; did you mean --doses\?",
    "--zap=3": r"no option --zap; there are: --preset, .*--force",
    "extra": r"does not know what to do with 'extra'",
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_clear_line_and_leaves_nothing_behind(lesion, command, line):
    Path("file").write_text("")
    Path("empty.txt").write_text("\n \n")
    Path("none.jsonl").write_text("")
    Path("empty.jsonl").write_text('{"prompt": " "}\n')
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    before = files(Path())
    given = ["--subject", "tiny-llama", *SMALL, *([] if "--site" in line else ["--site", "mlp"])]
    said = lesion(command, "degrade", *(["extra", *given] if line == "extra" else [*given, *line.split()]))
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("lesion") and said.err.count("\n") == 1, said.err
    assert re.search(WRONG[line], said.err), said.err
    assert files(Path()) == before and [p for p in Path().iterdir() if p.is_dir()] == []


def test_wrong_words(lesion):
    for words, expected in (
        ([], "arguments are required: COMMAND"),
        (["zap"], "invalid choice: 'zap'"),
        (["run"], "arguments are required: STUDY"),
        (["run", "zap"], "no study 'zap'; there are: degrade"),
        (["run", "--site", "mlp", "degrade"], "no study 'mlp'; there are: degrade"),
        (["status", "--zap"], "no option --zap; there are: --help, --lab, --verbosity"),
        (["status", "zap"], "does not know what to do with 'zap'"),
        (["show"], "arguments are required: KEY"),
        (["status"], "no lab at lab: `lesion run` and `lesion submit` make one"),
        (["export", "rows", "out"], "no lab at lab"),
    ):
        said = lesion(*words)
        assert said.code == 2 and expected in said.err and said.err.count("\n") == 1, said
    assert list(Path().iterdir()) == []


def test_keys_that_fit_none_or_many(lab, lesion):
    assert "no key begins with 'zz'; there are: " in lesion("show", "zz").err
    many = lesion("show", "")
    assert many.code == 2 and "10 keys begin with ''; there are: " in many.err and many.err.endswith(", …\n")
    assert "no key begins with 'zz'" in lesion("export", "zz", "out").err
    reading = next(iter(Store(lab).index.seals))
    assert lesion("export", reading, "out").code == 2 and not Path("out").exists(), "a reading is no state"


def test_a_lab_that_cannot_be_read_is_named_and_left_as_it_is(lab, lesion):
    (segment,) = (lab / "log").glob("*.jsonl")
    text = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*text[:2], b"garbage\n", *text[2:]]))
    before = files(Path())
    for words in (
        ["status"],
        ["run", *LLAMA],
        ["plan", *LLAMA],
        ["report", *LLAMA],
        ["show", "a"],
        ["export", "rows", "o"],
    ):
        said = lesion(*words)
        assert said.code == 2 and f"{segment.name} line 3 cannot be read" in said.err and said.err.count("\n") == 1
    assert files(Path()) == before


# ---------------------------------------------------------------------- help, logs, signals, terminals


@pytest.mark.parametrize("words", [[], *([c] for c in ("run", "plan", "report", "status", "show", "export"))])
def test_help_everywhere(lesion, words):
    said = lesion(*words, "--help")
    assert said.code == 0 and said.err == "" and said.out.startswith("usage: lesion")
    assert max(map(len, said.out.splitlines())) <= 100


@pytest.mark.parametrize("command", ["run", "plan", "report"])
def test_the_help_of_a_study_is_complete(lesion, command):
    from lesion.studies.degrade import Degrade

    said = lesion(command, "degrade", "-h")
    text = " ".join(said.out.split())
    assert said.code == 0 and text.startswith(f"usage: lesion {command} degrade [options]")
    for name, field in Degrade.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert " ".join(field.description.split()) in text
    for part in ("(default: smollm2)", "(default: attention.value mlp embedding)", "one of: mult-gauss, add-gauss,",
                 "--site SITE [SITE ...]", "--doses X [X ...]", "(default: 0.95)", "$LESION_LAB"):  # fmt: skip
        assert part in text, part
    assert "(default: )" not in text and "None" not in text
    assert ("--force" in text) == (command != "report")
    assert ("--verbosity" in text) == (command != "plan")


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from lesion import cli\ntry: cli.main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    for words, heavy in (
        (["--help"], None),
        (["run", "degrade", "--help"], {"torch", "transformers", "polars"}),
    ):
        done = process(*words, python=["-c", script])
        out, err = done.communicate(timeout=PATIENCE)
        loaded = {name.split(".")[0] for name in err.split()}
        assert done.returncode == 0 and "usage: lesion" in out
        if heavy is None:
            others = {m for m in loaded if m not in sys.stdlib_module_names and not m.startswith("_")}
            assert others <= {"lesion", "sitecustomize"}, others
        else:
            assert not loaded & heavy


def test_ctrl_c_says_so_and_the_same_command_goes_on(taken, tmp_path):
    line = ["run", *LLAMA, "--new-tokens", "60", "--batch", "1", "--threads", "1", "--lab", tmp_path / "lab"]
    running = process(*line)
    patience = time.monotonic() + PATIENCE
    while not any((tmp_path / "lab" / "log").glob("*.jsonl")) and time.monotonic() < patience:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, err
    assert err.endswith("interrupted; the same command goes on from here\n") and "Traceback" not in err
    before = len(Store(tmp_path / "lab").index.seals)
    done = process(*line)
    done.communicate(timeout=PATIENCE)
    assert done.returncode == 0
    assert before < len(Store(tmp_path / "lab").index.seals) == READINGS


def test_a_reader_that_goes_away_is_no_error(lab):
    done = process("export", "rows", "-", "--lab", lab)
    done.stdout.close()
    with done.stderr as said:
        assert said.read() == ""
    assert done.wait(timeout=PATIENCE) == 0


def test_a_terminal_that_knows_no_greek_is_no_error(lab, tmp_path):
    done = process("run", *LLAMA, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    out, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0 and "\\u2192" in out, err


def test_on_a_terminal_there_is_a_bar_and_then_the_answer(tmp_path):
    here, there = pty.openpty()
    line = [sys.executable, "-m", "lesion.cli", "run", *LLAMA]
    environment = {**os.environ, "PYTHONPATH": SRC, "TERM": "xterm", "COLUMNS": "100"}
    running = subprocess.Popen(line, stdout=there, stderr=there, stdin=there, env=environment, cwd=tmp_path)
    os.close(there)
    said = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(here)
    assert running.wait(timeout=PATIENCE) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert "\x1b[" in said.decode() and re.search(r"[1-7]/7", text) and " left" in text and " GiB" in text
    assert text.rstrip().splitlines()[-1].startswith("report: ")


def test_the_logs_of_many_runs_become_one(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    host = Store(tmp_path).writer.split("-")[1]
    for number in range(commands.LOGS):
        (folder / f"20250101T0000{number:02}-{host}-{2**22 + number}-abc.log").write_text(f"run {number}\n")
    living = [
        folder / f"x-{host}-{os.getpid()}-abc.log",
        folder / "x-elsewhere-1-abc.log",
        folder / f"x-{host}-{2**22}-abc.log",
    ]
    for path in living:
        path.write_text("still running\n")
    living[2].with_suffix(".jsonl").write_text("")
    commands._gather_logs(folder, Store(tmp_path).writer)
    assert sorted(folder.glob("*.log")) == sorted([*living, folder / "runs.log"])
    text = (folder / "runs.log").read_text()
    assert [line for line in text.splitlines() if line.startswith("run ")] == [f"run {n}" for n in range(commands.LOGS)]
    commands._gather_logs(folder, Store(tmp_path).writer)
    assert (folder / "runs.log").read_text() == text


def test_calibrate_prints_every_procedure_with_its_share(lesion):
    said = lesion("calibrate", "--simulations", "20")
    assert said.code in (0, 1) and " not as expected" in said.out
    for procedure in ("permutation", "mcnemar", "wilcoxon", "equivalent", "trend", "holm", "ED50"):
        assert procedure in said.out, procedure
