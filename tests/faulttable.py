"""The fault table: tests that put a fault in say which, how, how often, and what came of it.

    make faults        runs them all and prints the table

`fault(case, how, outcome, times)` enters a line; lines of one case, manner and outcome are added up. The outcome is what the
test has asserted: "refused by name", "finished, byte-identical", … A test that fails enters no line and fails the run.
"""

from collections import Counter

import pytest


@pytest.fixture
def fault(request):
    """Enters a line into the table, after what it says has been asserted."""

    def enter(case: str, how: str, outcome: str, times: int = 1) -> None:
        request.node.user_properties.append(("fault", [case, how, outcome, times]))

    return enter


def pytest_terminal_summary(terminalreporter, config):
    """Prints the table where it was asked for: pytest -v, as `make test` and `make faults` do."""
    found: Counter[tuple[str, str, str]] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "fault":
                case, how, outcome, times = value
                found[case, how, outcome] += times
    if not found or config.get_verbosity() < 0:
        return
    heads = ("case", "how injected", "times", "outcome")
    lines = [heads] + [(case, how, f"{times:,}", outcome) for (case, how, outcome), times in sorted(found.items())]
    width = [max(len(line[i]) for line in lines) for i in range(4)]
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line("  ".join(word.ljust(width[i]) for i, word in enumerate(line)).rstrip())
    terminalreporter.write_line(f"{sum(found.values()):,} faults in {len(found)} kinds")
