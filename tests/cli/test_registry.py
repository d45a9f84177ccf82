"""Which teachers there are, what a name means, and plugins that misbehave."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bootcli.cli.teachers import teachers
from bootcli.closed_form import GaussianTeacher
from bootcli.errors import BootError, UsageError
from bootcli.maths.schedule import LinearPath
from bootcli.teachers import hub, registry

from .conftest import Cli

Plugin = Callable[..., Path]
Family = Callable[..., str]


@pytest.fixture
def add(plugin: Plugin, family: Family, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a good plugin for this process: ``add("package", "family", "alias", ...)``."""

    def install(distribution: str, name: str, *aliases: str) -> None:
        monkeypatch.delitem(sys.modules, distribution.replace("-", "_"), raising=False)
        monkeypatch.syspath_prepend(str(plugin(distribution, name, family(name, *aliases))))

    return install


def test_an_alias() -> None:
    found = registry.resolve("fashion")
    assert found.family is not None
    assert found.family.name == "ddpm"
    assert Path(found.source).is_dir()
    assert found == registry.resolve("ddpm:fashion")


def test_a_hub_id_is_not_looked_up() -> None:
    found = registry.resolve("someone/something")
    assert (found.family, found.source, found.on_hub) == (None, "someone/something", True)
    assert registry.resolve("cifar10").on_hub
    assert registry.resolve("ddpm:someone/something").family is registry.family_named("ddpm")


def test_a_local_folder_comes_before_a_hub_id(tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "something").symlink_to(tiny_ddpm)
    monkeypatch.chdir(tmp_path)
    found = registry.resolve("someone/something")
    assert not found.on_hub
    assert found.family is registry.family_named("ddpm")


@pytest.mark.parametrize("name", ["", "nonsense", "a/b/c", "ddpm:", "nofamily:fashion"])
def test_a_name_that_means_nothing(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown teacher"):
        registry.resolve(name)


def test_two_families_read_one_folder(add: Callable[..., None], tmp_path: Path) -> None:
    add("plugin-one", "one")
    add("plugin-two", "two")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("")
    with pytest.raises(UsageError) as error:
        registry.resolve(str(tmp_path))
    assert error.value.hint == f"Say which: one:{tmp_path} or two:{tmp_path}"
    found = registry.resolve(f"two:{tmp_path}")
    assert found.family is not None
    assert found.family.name == "two"


def test_a_family_that_fails_at_every_path(
    plugin: Plugin, family: Family, tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family("failing").replace('(path / "failing.txt").exists()', "1 / 0")
    monkeypatch.syspath_prepend(str(plugin("plugin-failing", "failing", source)))
    assert registry.resolve(str(tiny_ddpm)).family is registry.family_named("ddpm")
    with pytest.raises(BootError) as error:
        registry.resolve(str(tmp_path))
    assert "(not tried: failing, ZeroDivisionError: division by zero)" in error.value.hint
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tiny_ddpm, tmp_path / "cache"))
    assert registry.load("someone/something").family is registry.family_named("ddpm")


def test_two_families_have_one_alias(add: Callable[..., None]) -> None:
    add("plugin-one", "one", "twin", "single")
    add("plugin-two", "two", "twin")
    with pytest.raises(UsageError) as error:
        registry.resolve("twin")
    assert error.value.hint == "Say which: one:twin or two:twin"
    assert registry.resolve("two:twin").family is registry.family_named("two")
    assert registry.resolve("single").family is registry.family_named("one")


def test_two_plugins_of_one_name(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    add("plugin-rival", "ddpm", "rival")
    for name in ("fashion", "rival", "ddpm:fashion"):
        with pytest.raises(UsageError, match=r"two plugins are called 'ddpm': bootcli .* and plugin-rival 1\.0"):
            registry.resolve(name)
    with pytest.raises(UsageError, match="two plugins"):
        registry.family_named("ddpm")
    assert [one.name for one in registry.installed() if one.error] == ["ddpm", "ddpm"]
    monkeypatch.setenv(registry.SWITCH, "")
    assert registry.resolve("fashion").family is not None


def test_the_switch_picks_plugins(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    add("plugin-one", "one")
    add("plugin-two", "two")
    for chosen, names in {
        "": ["ddpm", "edm", "sd"],
        "Plugin_Two": ["ddpm", "edm", "sd", "two"],
        "plugin-one, plugin-two": ["ddpm", "edm", "one", "sd", "two"],
    }.items():
        monkeypatch.setenv(registry.SWITCH, chosen)
        assert [one.name for one in registry.installed()] == names


def test_an_entry_point_under_another_name(plugin: Plugin, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin("plugin-odd", "odd", family("even"))))
    with pytest.raises(UsageError, match="calls itself 'even'"):
        registry.family_named("odd")


@pytest.mark.parametrize(
    "fault", ["raise ValueError('broken on import')", "import sys; sys.exit(7)", "family = 3", "x ="]
)
def test_a_broken_plugin_stands_in_nobodys_way(cli: Cli, plugin: Plugin, fault: str) -> None:
    site = str(plugin("plugin-broken", "broken", fault))
    assert cli("--help", PYTHONPATH=site).returncode == 0
    listed = cli("teachers", "--json", PYTHONPATH=site)
    assert listed.returncode == 0
    families = {one["family"]: one for one in json.loads(listed.stdout)}
    assert families["broken"]["error"]
    assert families["broken"]["from"] == "plugin-broken 1.0"
    assert families["ddpm"]["error"] is None
    assert "fashion" in families["ddpm"]["aliases"]
    asked = cli("teachers", "broken:x", PYTHONPATH=site)
    assert asked.returncode == 2
    assert "cannot be used" in asked.stderr


def test_the_list_shows_families_and_aliases(cli: Cli) -> None:
    listed = cli("teachers")
    assert listed.returncode == 0
    for word in ("fashion", "ddpm", "bootcli", "UNet2DModel"):
        assert word in listed.stdout


def test_listing_imports_no_torch(heavy: Callable[..., tuple[int, str, list[str]]]) -> None:
    assert not {"torch", "diffusers", "numpy"} & set(heavy("teachers")[2])


class Hub:
    """Stands in for the hub client: serves the wanted files of one folder, remembers what it gave."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository = repository
        self.cache = cache
        self.given: list[set[str]] = []

    def __call__(self, hub_id: str, allow_patterns: list[str]) -> str:
        names = [str(file.relative_to(self.repository)) for file in self.repository.rglob("*") if file.is_file()]
        wanted = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}
        for name in wanted:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.cache / name)
        self.given.append(wanted)
        return str(self.cache)


SAFE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("stored", "fetched"),
    [
        ([SAFE, "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"], SAFE),
        (["diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_the_hub_gives_small_files_first_and_weights_once(
    tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[str], fetched: str
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(tiny_ddpm, repository)
    tensors = load_file(repository / "unet" / SAFE)
    (repository / "unet" / SAFE).unlink()
    for name in stored:
        file = repository / "unet" / name
        torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file)
    serving = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", serving)
    loaded = registry.load("someone/something")
    assert loaded.family.name == "ddpm"
    assert loaded.origin == "huggingface.co/someone/something"
    assert all(name.endswith((".json", ".md")) for name in serving.given[0])
    weights = {name for given in serving.given for name in given if "diffusion_pytorch_model" in name}
    assert weights == {f"unet/{fetched}"}
    assert all(torch.equal(loaded.teacher.net.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_family_that_is_named_needs_no_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EDM pickle shows in no JSON; what else the repository holds is not fetched."""
    repository = tmp_path / "repository"
    shutil.copytree(registry.locate("fashion-edm"), repository, ignore=shutil.ignore_patterns("features"))
    (repository / "notes.txt").write_text("")
    serving = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", serving)
    loaded = registry.load("edm:someone/something")
    assert (loaded.family.name, loaded.origin) == ("edm", "huggingface.co/someone/something")
    assert not any("notes.txt" in given for given in serving.given)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(repository, tmp_path / "another"))
    with pytest.raises(BootError, match="No installed teacher family reads someone/something") as error:
        registry.load("someone/something")
    assert "edm:owner/name" in error.value.hint
    with pytest.raises(BootError):
        registry.load("ddpm:someone/something")


def test_a_hub_repository_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path, tmp_path / "cache"))
    with pytest.raises(BootError, match="No installed teacher family reads someone/something") as error:
        registry.load("someone/something")
    assert "ddpm:" in error.value.hint


def _raise(error: Exception) -> Callable[..., str]:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    return download


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ("gated", "HF_TOKEN", "huggingface.co/someone/something")),
        ("RepositoryNotFoundError", ("no repository", "HF_TOKEN", "--teacher ./something")),
        ("LocalEntryNotFoundError", ("Cannot reach the hub", "HF_HUB_OFFLINE", "--teacher ./something")),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, kind: str, words: tuple[str, ...]) -> None:
    from huggingface_hub import errors

    monkeypatch.delenv("HF_HUB_OFFLINE")
    cls = getattr(errors, kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _raise(cls.__new__(cls)))
    with pytest.raises(BootError) as error:
        hub.fetch("someone/something", [])
    for word in words:
        assert word in error.value.message + error.value.hint


def test_a_broken_connection_and_a_full_disk_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", _raise(RuntimeError("peer closed connection")))
    with pytest.raises(BootError, match="Cannot download someone/something: peer closed"):
        hub.fetch("someone/something", [])
    monkeypatch.setattr("huggingface_hub.snapshot_download", _raise(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        hub.fetch("someone/something", [])


def test_a_terminal_snr_of_zero_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flow = GaussianTeacher(torch.zeros(1, 2, 2), 0.5, LinearPath())
    loaded = registry.Loaded(flow, SimpleNamespace(name="flow"), "here", "test")  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "load", lambda name: loaded)
    teachers("flow")
    assert "terminal snr" in capsys.readouterr().out
