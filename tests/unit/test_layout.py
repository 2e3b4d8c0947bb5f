"""The house rules that a program can check."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FILES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}


def imports(name, everywhere=False):
    """Modules of this package that a module imports, at its top or (everywhere) inside functions too."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lesion"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lesion"))


def test_there_is_no_import_cycle():
    edges = {name: {i for i in imports(name) if i in FILES} for name in FILES}

    def visit(name, path):
        assert name not in path, " → ".join([*path, name])
        for target in edges[name]:
            visit(target, [*path, name])

    for name in FILES:
        visit(name, [])


def test_steps_and_measures_never_import_each_other_and_nothing_below_imports_a_study():
    for name in FILES:
        for target in imports(name, everywhere=True):
            if name.startswith("lesion.steps."):
                assert not target.startswith(("lesion.measures", "lesion.studies", "lesion.steps.")), (name, target)
            if name.startswith("lesion.measures."):
                assert not target.startswith(("lesion.steps", "lesion.studies", "lesion.measures.")), (name, target)
            if target.startswith("lesion.studies"):
                assert name.startswith("lesion.studies"), (name, target)


def test_files_are_one_idea_and_say_which():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{name} has {text.count(chr(10))} lines: two ideas?"
        assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"


def test_nothing_is_left_unfinished_and_no_error_is_swallowed():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError|except:\s*$", text, re.M), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(x, ast.Pass) for x in node.body), f"{name}:{node.lineno}"


def test_no_global_seed():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"np\.random\.seed|random\.seed\(", text), name
        if "torch.manual_seed" in text:
            assert "fork_rng" in text, f"{name} moves the global stream of torch"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 120
