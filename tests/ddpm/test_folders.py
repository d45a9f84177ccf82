"""Reading folders: both layouts, old weights, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_ddpm import family
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bootcli.errors import BootError

from .conftest import MakeFolder

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    state = family.load(folder).net.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def replace_weights(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write(folder / "unet" / name)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_both_layouts_and_both_kinds_of_weights(make_folder: MakeFolder, flat: bool, weights: str) -> None:
    folder = make_folder(flat=flat, weights=weights)
    assert family.matches(folder)
    net = UNet2DModel.from_pretrained(folder if flat else folder / "unet")
    assert_holds(folder, net.state_dict())
    assert not family.load(folder).net.training


def test_an_index_beside_flat_parts(make_folder: MakeFolder) -> None:
    """The layout of google/ddpm-cifar10-32: model_index.json, but no sub-folders."""
    folder = make_folder(flat=True)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}')
    assert family.matches(folder)
    assert family.load(folder).spec.sample_shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_old_attention_names(make_folder: MakeFolder, kind: str) -> None:
    folder = make_folder()
    expected = weights_of(folder)
    old = dict(expected)
    for new, former in OLD.items():
        old = {name.replace(f".{new}.", f".{former}."): tensor for name, tensor in old.items()}
    assert sum(".proj_attn." in name for name in old) > 2
    writers = {"safetensors": lambda path: save_file(old, path), "bin": lambda path: torch.save(old, path)}
    replace_weights(folder, f"diffusion_pytorch_model.{kind}", writers[kind])
    assert_holds(folder, expected)


def test_shards(make_folder: MakeFolder) -> None:
    folder = make_folder()
    expected = weights_of(folder)
    names = sorted(expected)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: expected[name] for name in part}, folder / "unet" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    replace_weights(
        folder, "diffusion_pytorch_model.safetensors.index.json", lambda path: path.write_text(json.dumps(index))
    )
    assert_holds(folder, expected)
    (folder / "unet" / "b.safetensors").unlink()
    with pytest.raises(BootError, match=r"b\.safetensors is missing"):
        family.load(folder)


def test_a_shard_cannot_lead_out_of_the_folder(make_folder: MakeFolder) -> None:
    folder = make_folder()
    index = json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}})
    replace_weights(folder, "diffusion_pytorch_model.safetensors.index.json", lambda path: path.write_text(index))
    with pytest.raises(BootError, match="beside it"):
        family.load(folder)


class Payload:
    """Creates a file when an ordinary unpickler reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_a_hostile_pickle_is_refused_and_not_executed(
    make_folder: MakeFolder, tmp_path: Path, write: Callable[..., object]
) -> None:
    folder, trap, control = make_folder(), tmp_path / "trap", tmp_path / "control"
    pickle.loads(pickle.dumps(Payload(control)))
    assert control.exists()
    replace_weights(folder, "diffusion_pytorch_model.bin", lambda path: write({"conv_in.weight": Payload(trap)}, path))
    with pytest.raises(BootError, match="Nothing in it was executed"):
        family.load(folder)
    assert not trap.exists()


def test_a_pickle_of_something_else_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    replace_weights(folder, "diffusion_pytorch_model.bin", lambda path: torch.save({"step": 3}, path))
    with pytest.raises(BootError, match="not a table of tensors"):
        family.load(folder)


def test_a_network_from_elsewhere_is_never_imported(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "my_net.py").write_text("raise SystemExit('executed')")
    edit(folder / "model_index.json", unet=["my_net", "UNet2DModel"])
    assert not family.matches(folder)
    with pytest.raises(BootError, match=r"my_net\.UNet2DModel"):
        family.load(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(weights_of(folder)), folder / "unet" / "diffusion_pytorch_model.safetensors")


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no network": (lambda f: shutil.rmtree(f / "unet"), "config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), r"unet.config\.json is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
    "cut config": (lambda f: truncate(f / "unet/config.json") or (f / "unet/config.json").write_text("{"), "JSON"),
    "binary config": (lambda f: (f / "unet/config.json").write_bytes(b"\xff\xfe\x00"), "JSON"),
    "list config": (lambda f: (f / "unet/config.json").write_text("[]"), "JSON object"),
    "deep config": (lambda f: (f / "unet/config.json").write_text("[" * 100_000), "JSON"),
    "cut scheduler": (lambda f: (f / "scheduler/scheduler_config.json").write_text(""), "JSON"),
    "cut weights": (lambda f: truncate(f / WEIGHTS), "not a readable safetensors"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "not a readable safetensors"),
    "lfs pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "readable"),
    "missing tensor": (lambda f: rewrite(f, lambda w: {k: v for k, v in w.items() if k != "conv_out.bias"}), "missing"),
    "unknown tensor": (lambda f: rewrite(f, lambda w: w | {"more": torch.ones(1)}), r"unknown \(more\)"),
    "wrong shape": (lambda f: rewrite(f, lambda w: w | {"conv_out.bias": torch.ones(7)}), r"\(7,\), not \(3,\)"),
    "other class": (lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"), "ConditionModel"),
    "other part": (lambda f: edit(f / "model_index.json", vqvae=["diffusers", "VQModel"]), "VQModel"),
    "bad block": (lambda f: edit(f / "unet/config.json", down_block_types=["Magic", "DownBlock2D"]), "Magic"),
    "bad width": (lambda f: edit(f / "unet/config.json", block_out_channels=None), "configuration is not valid"),
    "no size": (lambda f: edit(f / "unet/config.json", sample_size=None), "sample_size"),
    "odd size": (lambda f: edit(f / "unet/config.json", sample_size="ab"), "sample_size 'ab'"),
    "indivisible size": (lambda f: edit(f / "unet/config.json", sample_size=7), "configuration is not valid"),
    "bad channels": (lambda f: edit(f / "unet/config.json", in_channels=None), "configuration is not valid"),
    "bad padding": (lambda f: edit(f / "unet/config.json", downsample_padding=3), "not valid"),
    "bad norm": (lambda f: edit(f / "unet/config.json", norm_eps="a"), "configuration is not valid"),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=7), "reads 7 channels and predicts 3"),
    "short table": (
        lambda f: edit(f / "unet/config.json", time_embedding_type="learned", num_train_timesteps=9),
        "knows 9 timesteps",
    ),
    "latents": (lambda f: edit(f / "unet/config.json", in_channels=4, out_channels=4), "images of 4 channels"),
    "fourier": (lambda f: edit(f / "unet/config.json", time_embedding_type="fourier"), "fourier"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_explained(make_folder: MakeFolder, what: str) -> None:
    folder = make_folder()
    breaking, message = BROKEN[what]
    breaking(folder)
    with pytest.raises(BootError, match=message) as caught:
        family.load(folder)
    assert caught.value.hint


def test_paths_that_are_no_folder_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for path, message in ((file, "is a file"), (tmp_path / "none", "does not exist"), (tmp_path, "is missing")):
        assert not family.matches(path)
        with pytest.raises(BootError, match=message):
            family.load(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"unet": 3}', '{"unet": ["diffusers", "UNet2DConditionModel"]}'])
def test_matches_never_raises(tmp_path: Path, content: str) -> None:
    for name in ("model_index.json", "config.json"):
        (tmp_path / name).write_text(content)
        assert not family.matches(tmp_path)


def test_the_family_is_light() -> None:
    code = "import sys, bootcli_ddpm; bootcli_ddpm.family.matches(__import__('pathlib').Path('.')); "
    code += "assert not {'torch', 'diffusers', 'safetensors'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_aliases() -> None:
    assert Path(family.aliases["fashion"].source).is_absolute()
    assert family.aliases["cifar10"].source == "google/ddpm-cifar10-32"
    assert all(alias.summary for alias in family.aliases.values())
