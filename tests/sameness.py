"""Two labs that must hold the same, and what differs where they do not: in a few lines, since ten kilobytes of bytes tell nobody."""

from lesion.store import Store


def canonical(lab):
    return b"".join(Store(lab).canonical())


def assert_same(lab, expected, told=""):
    """That a lab holds `expected`, the canonical bytes of another. `told` is what explains a difference: logs, a status."""
    found = canonical(lab)
    if found == expected:
        return
    here, there = found.splitlines(), expected.splitlines()
    missing, extra = (
        [line for line in there if line not in set(here)],
        [line for line in here if line not in set(there)],
    )
    lines = [
        f"{lab}: {len(here)} lines for {len(there)}, {len(missing)} missing, {len(extra)} that should not be there"
    ]
    lines += [f"- {line[:160].decode(errors='replace')}" for line in missing[:4]]
    lines += [f"+ {line[:160].decode(errors='replace')}" for line in extra[:4]]
    raise AssertionError("\n".join([told, *lines]))
