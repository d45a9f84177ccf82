"""EDM teachers on the command line: from a pickle to a student, and files that would run code."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bootcli_edm.architecture import Architecture
from edm_pickle import SOURCE, write_pickle

from .conftest import Cli, Done

Inside = Callable[..., Done]


@pytest.fixture(scope="module")
def tiny_edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickle of a class-conditional network on 8x8 grey images; random weights."""
    torch.manual_seed(0)
    size = {"img_resolution": 8, "img_channels": 1, "label_dim": 3}
    unet = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    architecture = Architecture("EDMPrecond", size | unet | {"model_type": "SongUNet"})
    path = tmp_path_factory.mktemp("edm") / "tiny-edm.pkl"
    write_pickle(path, architecture, architecture.build(), snapshot=True)
    licence = b"# Attribution-NonCommercial-ShareAlike 4.0 International License"
    path.write_bytes(path.read_bytes().replace(SOURCE.encode(), licence.ljust(len(SOURCE))))
    return path


def refused(done: Done, said: str) -> tuple[int, bool]:
    """Exit code, and whether these words were said, wherever the lines break."""
    return done.returncode, said in " ".join(done.stderr.split())


def test_what_is_in_a_pickle(inside: Inside, tiny_edm: Path) -> None:
    done = inside("teachers", str(tiny_edm), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["family"], facts["conditioning"], facts["classes"]) == ("edm", "class", 3)
    assert facts["details"]["architecture"] == "SongUNet under EDMPrecond"
    assert facts["details"]["also in the file"].startswith("loss_fn")


def test_a_pickle_is_converted_once(inside: Inside, tiny_edm: Path, tmp_path: Path) -> None:
    done = inside("teachers", str(tiny_edm), "--convert", "tiny.safetensors")
    assert done.returncode == 0, done.stderr
    shown = [json.loads(inside("teachers", name, "--json").stdout) for name in (str(tiny_edm), "./tiny.safetensors")]
    for facts in shown:
        del facts["source"]
    assert shown[0] == shown[1]
    before = (tmp_path / "tiny.safetensors").read_bytes()
    for name, said in (("tiny.safetensors", "exists already"), ("tiny.pkl", "a .safetensors file")):
        assert refused(inside("teachers", str(tiny_edm), "--convert", name), said) == (2, True)
    assert refused(inside("teachers", "--convert", "other.safetensors"), "name the teacher") == (2, True)
    assert refused(inside("teachers", "fashion", "--convert", "other.safetensors"), "no form of its own") == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.safetensors"]
    assert (tmp_path / "tiny.safetensors").read_bytes() == before


@pytest.mark.parametrize("objective", ["boot", "kd", "freeflow"])
def test_from_a_pickle_to_a_student(inside: Inside, tiny_edm: Path, tmp_path: Path, objective: str) -> None:
    settings = ["--steps", "2", "--batch-size", "8", "--classes", "0,2", "--set", "preview_teacher_steps=3"]
    settings += ["--set", "clock=log"] if objective == "boot" else []
    done = inside("distill", "--teacher", str(tiny_edm), "--objective", objective, "--output", "run", *settings)
    assert done.returncode == 0, done.stderr
    done = inside("sample", "run", "-n", "2", "--class", "2", "--output", "images")
    assert done.returncode == 0, done.stderr
    done = inside("export", "run")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "run" / "export" / "safetensors" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card
    assert "Its licence is that of its teacher: cc-by-nc-sa-4.0." in card


@pytest.mark.slow
def test_one_step_of_fashion_edm_is_better_than_seven_calls_of_its_teacher(cli: Cli) -> None:
    """The embedded EDM teacher, a tenth of its recipe: Heun in 4 steps calls it 7 times."""
    few = ["--steps", "60", "--preview-every", "0", "--set", "preview_teacher_steps=2", "--set", "watch.every=0"]
    done = cli("distill", "--teacher", "fashion-edm", "--output", "run", *few)
    assert done.returncode == 0, done.stderr
    metrics = ["--metric", "fid", "--metric", "accuracy", "-n", "500", "--teacher-steps", "4"]
    done = cli("evaluate", "run", *metrics, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    student, (teacher,) = found["student"], found["teacher"]
    assert (student["nfe"], teacher["nfe"]) == (1, 7)
    assert student["fid"] < teacher["fid"]
    assert student["accuracy"] > teacher["accuracy"]


def test_another_clock_needs_a_family_that_has_one(inside: Inside) -> None:
    assert refused(inside("distill", "--set", "clock=log", "--steps", "1"), "times have one spacing") == (2, True)


@pytest.mark.parametrize("named", ["evil.pkl", "edm:evil.pkl"])
def test_a_file_that_would_run_code_is_refused_in_one_message(inside: Inside, tmp_path: Path, named: str) -> None:
    file = tmp_path / "evil.pkl"
    file.write_bytes(b"\x80\x04\x8c\x17torch_utils.persistence0cos\nsystem\n\x8c\ntouch made\x85R.")
    for command in (["teachers", named], ["distill", "--teacher", named]):
        done = inside(*command)
        assert done.returncode == 1
        assert done.stdout == ""
        said = " ".join(done.stderr.split())
        assert said.lower().count("error") == 1
        assert "asks for 'os.system'" in said
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_the_network_of_cifar10_at_full_size_in_6_gb(cli: Cli, tmp_path: Path) -> None:
    """DDPM++ as EDM trains it for CIFAR-10: 56 million parameters, here random ones."""
    size = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "augment_dim": 9}
    unet = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
    architecture = Architecture("EDMPrecond", size | unet | {"model_type": "SongUNet", "dropout": 0.13})
    path = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    write_pickle(path, architecture, architecture.build())
    few = ["--steps", "2", "--batch-size", "8"]
    few += ["--set", "kd.teacher_steps=2", "--set", "preview_teacher_steps=2", "--set", "watch.every=0"]
    done = cli("distill", "--teacher", str(path), "--output", "run", *few)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6  # kilobytes
    facts = json.loads(cli("teachers", str(path), "--json").stdout)
    assert 55e6 < facts["parameters"] < 57e6
