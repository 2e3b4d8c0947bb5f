"""The command line: a thin wrapper over `Lab` and the studies.

    lesion run degrade --subject smollm2 --site attention.value --doses 0 0.35 0.7
    lesion plan | report | status | show | export
    lesion submit degrade … --profile cluster.toml; lesion status | logs | cancel | resubmit

The options of a study are the fields of its spec: names, kinds, choices and defaults come from there, and the spec alone
says what is a possible value. Heavy imports happen where work starts, so that `lesion --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from lesion.study import Study

STUDIED = ("run", "plan", "report", "submit", "fetch")  # commands that speak of a study
_SAME = f"{', '.join(STUDIED[:-1])} and {STUDIED[-1]}"
VERBOSITY = ("quiet", "normal", "verbose")
OK, FAILED, WRONG_INPUT, UNFINISHED, INTERRUPTED = 0, 1, 2, 75, 130
MISPLACED = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(args: list[str] | None = None) -> None:
    """Entry point of the `lesion` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show σ must not stop a run
    args = sys.argv[1:] if args is None else args
    code = run(args)
    try:
        sys.stdout.flush()
    except OSError:
        # said already; what is left would be printed again as the interpreter ends, and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if args[:1] == ["work"]:  # threads of gloo abort now and then while an interpreter takes itself apart
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Runs one command and returns its exit code: 0 done, 1 something failed, 2 wrong input, 75 unfinished, 130 interrupted."""
    options, rest = parser().parse_known_args(args)
    if rest and "study" not in options:
        options.parser.unknown(rest)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lesion import commands, jobcommands
    from lesion.trial import Unfinished

    try:
        code: int = getattr(commands if hasattr(commands, options.command) else jobcommands, options.command)(
            options, rest
        )
        sys.stdout.flush()  # here a full device is still an error with a name
        return code
    except KeyboardInterrupt:
        goes_on = options.command in ("run", "work") and not getattr(options, "force", False)
        print(f"interrupted{'; the same command goes on from here' if goes_on else ''}", file=sys.stderr)
        return INTERRUPTED
    except Unfinished as error:
        print(f"unfinished, {error}; the same command goes on from here", file=sys.stderr)
        return UNFINISHED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"lesion: {place}{error.strerror or error}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, MISPLACED) else FAILED
    except ValueError as error:
        print(f"lesion: {in_words(error)}", file=sys.stderr)
        return WRONG_INPUT


class Help(argparse.HelpFormatter):
    """Lines of at most a hundred characters, and room for the names of options."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns - 2, 100))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # "ablate-largest" is one word


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def __init__(self, **more: Any):
        super().__init__(formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message} (see `{self.prog} --help`)\n")

    def unknown(self, rest: Sequence[str]) -> NoReturn:
        """Refuses words that mean nothing here, and names what they may have been meant for."""
        from difflib import get_close_matches

        word = next((word for word in rest if word.startswith("-")), None)
        if word is None:
            self.error(f"does not know what to do with {rest[0]!r}")
        word = word.split("=")[0]
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        close = get_close_matches(word, known, 1, cutoff=0.7)
        self.error(f"no option {word}; " + (f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"))


class StudyHelp(argparse.Action):
    """`lesion run --help` is answered here, `lesion run STUDY --help` once the study is known."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        if namespace.study is None:
            parser.print_help()
            parser.exit()
        namespace.help = True


def parser() -> Parser:
    """Everything but the options of the studies, which each study brings itself."""
    from lesion import __version__

    top = Parser(
        prog="lesion",
        description="Controlled interventions on language models: damage, measure, undo, say whether it mattered.",
        epilog="`lesion COMMAND --help` says more. Exit codes: 0 done, 1 something failed, 2 wrong input, 75 unfinished but "
        "saved, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"lesion {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, **more: Any) -> Parser:
        made: Parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", **more)
        made.set_defaults(parser=made)
        shared(made, name)
        return made

    names = ", ".join(_studies())
    for name, what in (
        ("run", "take what a study still lacks, then answer it"),
        ("plan", "say what a run would do and cost, without doing it"),
        ("report", "answer a study from what is in the lab"),
        ("submit", "take what a study still lacks as jobs, on a cluster or on this machine"),
        ("fetch", "bring a study's models and data into the caches, for machines that reach no hub"),
    ):
        more = f"`lesion {name} STUDY --help` lists the options of a study. {_SAME} understand the same ones."
        made = command(name, what, usage=f"lesion {name} STUDY [options]", epilog=more, add_help=False)
        made.add_argument("study", metavar="STUDY", help=f"one of: {names}")
        made.add_argument("-h", "--help", action=StudyHelp, nargs=0, default=False, help="this help")
    calibrated = commands.add_parser("calibrate", help="what the statistics do on studies of known truth, as a table")
    calibrated.set_defaults(parser=calibrated)
    calibrated.add_argument(
        "--simulations", type=_count, metavar="N", default=1000, help="of each kind (default: 1000)"
    )
    calibrated.add_argument("--seed", type=_count, metavar="N", default=0, help="of the simulations (default: 0)")
    command("status", "what a lab holds, what failed, and what has become of jobs")
    shown = command("show", "one state, reading or failure")
    shown.add_argument("key", metavar="KEY", help="its key, or the beginning of it; `lesion status` lists states")
    for name, what in (
        ("cancel", "end what was submitted and is not over; what was read stays"),
        ("resubmit", "submit again what is missing of what was submitted"),
    ):
        made = command(name, what)
        made.add_argument(
            "name", metavar="NAME", nargs="?", help="of a submission, or its beginning, as `lesion status` shows it"
        )
    logged = command("logs", "the ends of the logs of jobs")
    logged.add_argument("job", metavar="JOB", nargs="?", help="of one job only (default: of all that are not done)")
    logged.add_argument("--lines", type=_count, metavar="N", default=20, help="of each log (default: 20)")
    worked = commands.add_parser("work", description="What a job runs: one task of a submission.")
    worked.set_defaults(parser=worked)
    worked.add_argument("folder", type=Path, metavar="FOLDER", help="of the submission")
    worked.add_argument("number", type=_count, metavar="N", help="of the task")
    exported = command("export", "write something out of the lab")
    exported.add_argument(
        "what",
        metavar="WHAT",
        help="`rows` (all that was read, as sorted JSON lines without timings), or the key of a state (as a transformers "
        "directory)",
    )
    exported.add_argument("to", metavar="TO", help="file or directory that does not exist yet; `-` prints rows")
    return top


def shared(made: argparse._ActionsContainer, command: str) -> None:
    """Options that are not a study's own. What one of the commands that speak of a study has no use for it takes without a
    word, so that the same line serves all of them."""

    def option(name: str, *serves: str, help: str, **more: Any) -> None:
        if command in serves or command in STUDIED:
            made.add_argument(name, help=help if command in serves else argparse.SUPPRESS, **more)

    made.add_argument(
        "--lab",
        type=_directory,
        metavar="DIR",
        default=os.environ.get("LESION_LAB") or "lab",
        help="where everything is kept (default: $LESION_LAB, else ./lab)",
    )
    told = f"how much is said: {', '.join(VERBOSITY)} (default: normal)"
    option("--verbosity", "run", "report", "status", help=told, metavar="HOW", choices=VERBOSITY, default="normal")
    if command in ("submit", "resubmit"):
        jobs(made, command)
    else:
        option("--device", "run", help="cpu, cuda, cuda:1, mps (default: cpu)", metavar="NAME", default="cpu")
    also = "where metrics of trainings also go: tensorboard, trackio, wandb (default: only metrics.jsonl)"
    option("--track", "run", help=also, metavar="NAME", default=None)
    all_of_them = "processor threads; 0: as many as there are (default: 0)"
    option("--threads", "run", "plan", help=all_of_them, metavar="N", type=_count, default=0)
    option("--force", "run", "plan", help="take every reading of the study again", action="store_true")


def jobs(made: argparse._ActionsContainer, command: str) -> None:
    """Options of what is submitted."""
    again = command == "resubmit"

    def default(otherwise: str) -> str:
        return "(default: as before)" if again else f"(default: {otherwise})"

    where = default("slurm") if again else "(needed for slurm)"
    made.add_argument("--profile", type=Path, metavar="FILE", help=f"what a job is given: docs/cluster.md {where}")
    made.add_argument(
        "--on", choices=("slurm", "local"), default=None if again else "slurm", help=f"where {default('slurm')}"
    )
    many = f"processes at a time, on this machine {default('1')}"
    made.add_argument("--workers", type=_positive, metavar="N", help=many)
    devices = f"cpu, cuda, mps {default('cuda where the profile gives GPUs, else cpu')}"
    made.add_argument("--device", metavar="NAME", help=devices)
    made.add_argument("--dry-run", action="store_true", help="print the tree and every job script, and submit nothing")


def parse_study(options: argparse.Namespace, rest: list[str]) -> Study:
    """The study named on the command line, with its options. Raises ValueError for an option that makes no sense."""
    from pydantic import ValidationError

    from lesion.study import study

    named = study(options.study)
    called = f"lesion {options.command} {named.name}"
    made = Parser(prog=called, usage=f"{called} [options]", description=named.__doc__, add_help=False)
    own = made.add_argument_group("the study")
    for name, field in named.model_fields.items():
        _option(own, name, field)
    manner = made.add_argument_group("how it is run")
    shared(manner, options.command)
    manner.add_argument("-h", "--help", action="help", help="this help")
    if options.help:
        made.print_help()
        made.exit()
    given, unknown = made.parse_known_args(rest)
    if unknown:
        made.unknown(unknown)
    try:
        return named.model_validate({name: getattr(given, name) for name in named.model_fields if name in given})
    except ValidationError as error:
        raise ValueError(in_words(error, named)) from None


def _option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """A field of a spec as an option. Its words stay strings: pydantic knows better what may become of them."""
    kinds = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
    (kind,) = (kind for kind in kinds if kind is not type(None))
    many = get_origin(kind) is tuple
    single = get_args(kind)[0] if many else kind
    choices = get_args(single) if get_origin(single) is Literal else ()
    assert choices or single in (str, int, float, bool), f"no way to write {name}: {field.annotation} on a command line"
    default = field.get_default(call_default_factory=False)
    said = "; ".join(filter(None, [field.description, f"one of: {', '.join(map(str, choices))}" if choices else ""]))
    if field.is_required():
        said += " (required)"
    elif default not in (None, ()):
        words = default if many else (default,)
        said += f" (default: {' '.join(shlex.quote(str(word)) for word in words)})"
    how: dict[str, Any] = {"metavar": {int: "N", float: "X"}.get(single, name.upper())}
    if many:
        how |= {"nargs": "+", "action": "extend"}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=said.replace("%", "%%"), **how)


def in_words(error: ValueError, spec: type[Study] | None = None) -> str:
    """An error on one line. Of pydantic's: where, what was expected and what came, without addresses."""
    if not hasattr(error, "errors"):
        return " ".join(str(error).split("\n"))
    said = []
    for part in error.errors():
        where = ".".join(map(str, part["loc"]))
        if part["loc"] and spec is not None and part["loc"][0] in spec.model_fields:
            where = f"--{part['loc'][0].replace('_', '-')}"
        what = part["msg"].removeprefix("Input ").removeprefix("Value error, ").split(", unable to parse")[0]
        came = f", not {part['input']!r}" if where and part["type"] != "missing" else ""
        said.append(f"{where} {what}{came}".strip())
    return "; ".join(dict.fromkeys(said))


def _directory(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a directory, got nothing")
    path = Path(text).expanduser()
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a directory, but {there} is a file")
    return path


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text!r}")
    return int(text)


def _studies() -> list[str]:
    folder = Path(__file__).parent / "studies"
    return sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if not p.stem.startswith("_"))


if __name__ == "__main__":
    main()
