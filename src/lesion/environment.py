"""What a reading was taken with: recorded once for each writer, so that two numbers can be compared knowingly."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "lesion",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "polars",
    "gguf",
    "bitsandbytes",
    "peft",
)


def environment(device: str) -> dict[str, Any]:
    """Versions, machine, threads and device. No paths, no user names, no secrets."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """The processor's model name, which `platform` does not know on Linux."""
    if sys.platform == "linux":
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
