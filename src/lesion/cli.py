"""The command line: a thin wrapper over `Lab` and the studies.

    lesion run degrade --subject smollm2 --site attention.value --doses 0 0.35 0.7
    lesion plan | status | report | show | export

The options of a study are the fields of its spec; tyro makes the help from them. Heavy imports happen where work starts,
so that `lesion --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesion.study import Study

VERBOSITY = ("quiet", "normal", "verbose")
OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(args: list[str] | None = None) -> None:
    """Entry point of the `lesion` command."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Runs one command and returns its exit code: 0 done, 1 something failed, 2 wrong input, 130 interrupted."""
    options, rest = parser().parse_known_args(args)
    if rest and "study" not in options:
        parser().error(f"{options.command} does not know {rest[0]!r}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lesion import commands

    try:
        return getattr(commands, options.command)(options, rest)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        print(f"lesion: {_first_words(error)}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK


def _first_words(error: ValueError) -> str:
    """A pydantic error without its addresses: field, what was expected, what came."""
    if hasattr(error, "errors"):
        said = []
        for part in error.errors():
            where = ".".join(map(str, part["loc"]))
            came = f" (got {part['input']!r})" if where else ""
            said.append(f"{where + ': ' if where else ''}{part['msg'].removeprefix('Value error, ')}{came}")
        return "; ".join(said)
    return str(error)


def parser() -> argparse.ArgumentParser:
    """Everything but the options of the studies, which each study brings itself."""
    top = argparse.ArgumentParser(
        prog="lesion",
        description="Controlled interventions on language models: damage, measure, undo, say whether it mattered.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what, allow_abbrev=False, **more)
        made.add_argument(
            "--lab",
            type=Path,
            default=Path(os.environ.get("LESION_LAB", "lab")),
            help="directory (default: ./lab or $LESION_LAB)",
        )
        made.add_argument("--verbosity", choices=VERBOSITY, default="normal", help="how much is said on the terminal")
        return made

    names = ", ".join(_studies())
    for name, what in (
        ("run", "take what a study still lacks, then answer it"),
        ("plan", "say what a run would do and cost, without doing it"),
        ("report", "answer a study from what is in the lab"),
    ):
        made = command(
            name, what, epilog=f"studies: {names}. `lesion {name} STUDY --help` lists its options.", add_help=False
        )
        made.add_argument("study", nargs="?", metavar="STUDY", help=f"one of: {names}")
        made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
        made.add_argument("--threads", type=int, default=0, metavar="N", help="processor threads (default: all cores)")
        made.add_argument("-h", "--help", action="store_true", help="this help, and that of the study")
        if name == "run":
            made.add_argument("--force", action="store_true", help="take every reading of this study again")
    command("status", "what a lab holds: states, readings, rows, failures")
    shown = command("show", "one state, reading or failure, by the beginning of its key")
    shown.add_argument("key", metavar="KEY")
    exported = command("export", "write something out of the lab")
    exported.add_argument(
        "what", metavar="WHAT", help="`rows` (sorted JSON lines), or the key of a state (a transformers directory)"
    )
    exported.add_argument(
        "to", metavar="TO", type=Path, help="file or directory that does not exist yet; `-` is the terminal"
    )
    return top


def parse_study(options: argparse.Namespace, rest: list[str]) -> Study:
    """The study named on the command line, with its options."""
    import tyro

    from lesion.study import study

    top = parser()
    subparser = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices[options.command]
    if options.study is None:
        subparser.print_help()
        sys.exit(OK if options.help else WRONG_INPUT)
    made = study(options.study)
    if options.help:
        print("shared options:")
        subparser.print_usage()
    return tyro.cli(
        made,
        args=[*rest, *(["--help"] if options.help else [])],
        prog=f"lesion {options.command} {options.study}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _studies() -> list[str]:
    folder = Path(__file__).parent / "studies"
    return sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if not p.stem.startswith("_"))


def _version() -> str:
    from lesion import __version__

    return f"lesion {__version__}"


if __name__ == "__main__":
    main()
