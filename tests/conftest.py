"""What all tests share: quiet libraries, one thread each, and words that only tests know."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import submitit  # noqa: F401
import torch
import transformers
from hypothesis import settings

from faulttable import fault as fault
from faulttable import pytest_terminal_summary as pytest_terminal_summary

# submitit (above) configures logging when it is first imported, which closes the handlers of everybody else; absl's (rouge-score) then
# closes the stream that it found at its own import: the file into which pytest captures, and no later test of that worker begins.
# Imported before any test has a handler, it closes nothing.
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
settings.register_profile("any-machine", deadline=None)  # a slow machine is no fault
settings.load_profile("any-machine")
torch.set_num_threads(1)
torch.set_num_threads = lambda _: None  # a command that runs inside a test would take the cores of its neighbours


@pytest.fixture
def lab(tmp_path):
    from lesion import Lab

    return Lab(tmp_path / "lab")
