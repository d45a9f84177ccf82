"""`bootcli env`."""

from __future__ import annotations

import os
import platform

from bootcli.cli.common import print_json
from bootcli.cli.options import JsonOption, examples

EXAMPLES = examples("bootcli env", "bootcli env --json > env.json")

PACKAGES = (
    "bootcli",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "scipy",
    "clean-fid",
    "open-clip-torch",
    "typer",
    "rich",
)


def env(as_json: JsonOption = False) -> None:
    """Show versions, devices, caches and plugins, for bug reports."""
    from bootcli import ui

    groups = {"versions": _versions(), "devices": _devices(), "caches": _caches(), "plugins": _plugins()}
    if as_json:
        print_json(groups)
    else:
        for name, facts in groups.items():
            ui.print_facts(facts, name)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _caches() -> dict[str, str]:
    from huggingface_hub import constants
    from platformdirs import user_cache_dir

    return {
        "bootcli": user_cache_dir("bootcli"),
        "HF_HOME": constants.HF_HOME,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_OFFLINE": str(constants.HF_HUB_OFFLINE),
        "HF_TOKEN": "set" if os.environ.get("HF_TOKEN") else "not set",
    }


def _plugins() -> dict[str, str]:
    from bootcli.teachers.registry import SWITCH, installed

    found = {f"{one.name}, {one.distribution}": one.error or "ok" for one in installed()}
    return {**found, SWITCH: os.environ.get(SWITCH, "not set")}
