"""What README.md and CONTRIBUTING.md show works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_the_example_of_the_readme(tmp_path):
    (code,) = blocks("README.md")
    smaller = code.replace("documents=8, tokens=256", "documents=2, tokens=32").replace(
        "Generation(seed=1)", "Generation(seed=1, prompts=2, new_tokens=3)"
    )
    assert smaller != code
    done = run(
        smaller + "\nassert table.height == 3 * (2 + 2)\nprint(table['trial'].unique(maintain_order=True).to_list())",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "smollm2 >> noise(site=mlp, sigma=0.3, seed=1) >> noise(" in done.stdout


def test_the_step_and_the_measure_of_contributing(tmp_path):
    step, measure = blocks("CONTRIBUTING.md")
    code = (
        f"{step}\n{measure}\n"
        + """
from lesion import Lab, Scratch
table = Lab("lab").read([Scratch(), Scratch() >> Negate(site="mlp")], [Norms()])
a, b = (part for _, part in table.group_by("trial", maintain_order=True))
assert a["norm"].to_list() == b["norm"].to_list() and a.height > 10
"""
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
