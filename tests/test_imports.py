"""The architecture as a test: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "bootcli"
PLUGINS = ROOT / "plugins"

# A module may import from its own layer and from the ones before it.
LAYERS = [
    {"bootcli", "bootcli.errors", "bootcli.paths", "bootcli.prompts", "bootcli.signals", "bootcli.watch"},
    {"bootcli.config"},
    {"bootcli.maths"},
    {"bootcli.teachers"},
    {"bootcli.closed_form", "bootcli.testing", "bootcli.testing_network", "bootcli.plugin"},
    {"bootcli.ema", "bootcli.engine", "bootcli.lora", "bootcli.muon", "bootcli.optimizer"},
    {"bootcli.student", "bootcli.critic", "bootcli.memory"},
    {"bootcli.judge", "bootcli.companion", "bootcli.deck", "bootcli.conditions"},
    {"bootcli.objectives"},
    {"bootcli.batch"},
    {"bootcli.trainer"},
    {"bootcli.store"},
    {"bootcli.images"},
    {"bootcli.manifold"},
    {"bootcli.sampler", "bootcli.evaluate", "bootcli.reference", "bootcli.exporters"},
    {"bootcli.pipelines"},
    {"bootcli.ui"},
    {"bootcli.cli"},
]
ONLY_IN = {
    "rich": {"bootcli.ui"},
    "accelerate": {"bootcli.engine", "bootcli.teachers.family"},
    "peft": {"bootcli.lora"},
    "bitsandbytes": {"bootcli.optimizer"},
    "PIL": {"bootcli.images"},
    "cleanfid": {"bootcli.evaluate"},
    "diffusers": set(),
    "transformers": set(),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Every imported module, wherever in the file; type-checking imports too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer_of(module: str) -> int:
    ranks = [
        rank
        for rank, members in enumerate(LAYERS)
        if any(module == m or (m != "bootcli" and module.startswith(f"{m}.")) for m in members)
    ]
    assert ranks, f"{module} has no layer: add it to LAYERS"
    return ranks[0]


CORE_FILES = sorted(p for p in CORE.rglob("*.py") if p.name != "__main__.py")


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    module = name_of(path)
    # The registry is cheap to import and `bootcli.plugin` names its classes lazily: the one look ahead is its own.
    for imported in imports_of(path):
        if imported.split(".")[0] == "bootcli":
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_libraries_stay_at_home(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        homes = ONLY_IN.get(imported.split(".")[0])
        assert homes is None or module in homes, f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted((CORE / "maths").glob("*.py")), ids=name_of)
def test_maths_is_pure(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for imported in imports_of(path):
        assert imported.split(".")[0] not in {"diffusers", "accelerate", "logging", "json"}
        assert not imported.startswith("numpy") or imported.startswith("numpy.polynomial"), "arrays are torch's"
        assert not imported.startswith("bootcli.") or imported.startswith("bootcli.maths"), imported
    for word in ("torch.randn", "torch.rand(", "nn.Module", "print(", "open("):
        assert word not in text, f"{path.name} uses {word}"


@pytest.mark.parametrize("path", sorted([*PLUGINS.rglob("*.py"), *(ROOT / "examples").rglob("*.py")]), ids=str)
def test_plugins_import_only_the_public_surface(path: Path) -> None:
    if "plugins" not in path.parts and "plugin" not in path.parts:
        pytest.skip("not a plugin")
    for imported in imports_of(path):
        if imported.split(".")[0] == "bootcli":
            assert imported == "bootcli.plugin", f"{path} imports {imported}"
