"""The teacher itself: contract, labels, files, and the road from a pickle to a student."""

from __future__ import annotations

import copy
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_edm import consistency, family
from bootcli_edm.files import network_file
from bootcli_edm.teacher import build, load
from diffusers import UNet2DModel
from edm_pickle import SOURCE
from torch import Tensor

from bootcli.config import resolve
from bootcli.engine import Engine
from bootcli.errors import BootError, UsageError
from bootcli.pipelines.networks import make_networks
from bootcli.plugin import VarianceExploding, check_teacher
from bootcli.student import Student
from bootcli.teachers.view import TeacherView
from tests.original_names import RESNET

from .conftest import ADM, SONG, MakePickle


@pytest.mark.parametrize(
    ("class_name", "arguments"),
    [
        ("EDMPrecond", SONG),
        ("EDMPrecond", SONG | {"label_dim": 0, "embedding_type": "fourier", "encoder_type": "residual"}),
        ("VPPrecond", SONG),
        ("VEPrecond", SONG | {"encoder_type": "skip", "resample_filter": [1, 3, 3, 1]}),
        ("EDMPrecond", ADM),
        ("EDMPrecond", ADM | {"model_channels": 64, "label_dim": 0}),
        ("iDDPMPrecond", ADM),
    ],
)
def test_the_whole_contract(make_pickle: MakePickle, class_name: str, arguments: dict[str, Any]) -> None:
    teacher = family.load(make_pickle(class_name, arguments))
    assert check_teacher(teacher, family)
    assert teacher.head() == ("native" if class_name == "EDMPrecond" else "x0")


@pytest.mark.parametrize(("class_name", "arguments"), [("VPPrecond", SONG), ("VEPrecond", SONG), ("iDDPMPrecond", ADM)])
def test_a_student_starts_at_the_mean_that_is_asked_for(
    make_pickle: MakePickle, class_name: str, arguments: dict[str, Any]
) -> None:
    """VE's noise is the negative of what the network gives, and iDDPM's has channels beyond those of the image."""
    teacher = load(make_pickle(class_name, arguments | {"img_channels": 3}))
    student = Student(teacher, teacher.head(), t_min=0.0)
    eps, cond, mean = torch.randn(64, 3, 8, 8), teacher.condition([0] * 64), torch.tensor([-0.4, 0.1, 0.3])
    student.start_at(mean, eps, cond)
    with torch.no_grad():
        assert (student.sample(eps, cond).mean((0, 2, 3)) - mean).abs().max() < 0.1


def test_a_halved_teacher_keeps_its_frequencies(make_pickle: MakePickle) -> None:
    """Rounded, those of Fourier embeddings would be others: sigma times a number of some tens is an angle."""
    teacher = load(make_pickle("EDMPrecond", SONG | {"embedding_type": "fourier"}))
    x, t, cond = torch.randn(4, 1, 8, 8), torch.full((4,), 0.6, dtype=torch.float64), teacher.condition([0, 1, 2, 0])
    view = TeacherView(teacher)
    tables, before = {name: table.clone() for name, table in teacher.net.named_buffers()}, view.x0(x, t, cond)
    make_networks(teacher, resolve({"memory.half_teacher": True}), Engine("cpu", "bf16"))
    assert {parameter.dtype for parameter in teacher.net.parameters()} == {torch.bfloat16}
    for name, table in teacher.net.named_buffers():
        assert torch.equal(table, tables[name])
    with torch.autocast("cpu", torch.bfloat16):
        after = view.x0(x, t, cond)
    assert (after - before).square().mean() < 1e-3 * before.square().mean()


def test_the_view_is_the_denoiser(make_pickle: MakePickle) -> None:
    """Whatever the network predicts, the teacher's x_0 is D(x; sigma)."""
    for class_name in ("EDMPrecond", "VPPrecond", "VEPrecond"):
        teacher = load(make_pickle(class_name))
        t = torch.tensor([0.4, 0.9], dtype=torch.float64)
        sigma = teacher.spec.schedule(t).sigma.float()
        x = torch.randn(2, 1, 8, 8) * sigma[:, None, None, None]
        cond = teacher.condition([0, 2])
        with torch.no_grad():
            expected = teacher.net(x, sigma, cond.tensors["labels"])
        assert torch.allclose(TeacherView(teacher).x0(x, t, cond), expected, atol=1e-4 * float(sigma.max()))


@pytest.mark.parametrize(
    ("class_name", "levels"),
    [
        ("EDMPrecond", (0.002, 80)),
        ("VPPrecond", (0.002, 80)),
        ("VEPrecond", (0.02, 80)),
        ("iDDPMPrecond", (0.0064, 80)),
    ],
)
def test_noise_levels_are_those_of_the_sampler_that_the_network_knows(
    make_pickle: MakePickle, class_name: str, levels: tuple[float, float]
) -> None:
    schedule = load(make_pickle(class_name)).spec.schedule
    assert isinstance(schedule, VarianceExploding)
    assert (schedule.sigma_min, schedule.sigma_max) == (pytest.approx(levels[0], rel=0.05), levels[1])
    narrow = load(make_pickle("EDMPrecond", SONG | {"sigma_min": 0.1, "sigma_max": 20.0})).spec.schedule
    assert narrow == VarianceExploding(0.1, 20.0, 7.0)


def test_times_may_be_uniform_in_log_sigma(make_pickle: MakePickle) -> None:
    teacher = load(make_pickle("VPPrecond"))
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    levels = teacher.spec.schedule(teacher.spec.schedule.grid(18)).sigma
    x, cond = torch.randn(1, 1, 8, 8), teacher.condition([0])
    at_one = teacher.predict(teacher.net, x, teacher.spec.schedule.grid(18)[9:10], cond)
    teacher.use_clock("log")
    sigma = teacher.spec.schedule(t).sigma
    assert sigma[0] == 0
    assert sigma[1:].log().diff().tolist() == pytest.approx([math.log(80 / 0.002) / 4, math.log(80 / 0.002) / 2])
    # The sampler's levels stay where they were, and a level is predicted alike at its new time.
    assert torch.allclose(teacher.spec.schedule(teacher.spec.schedule.grid(18)).sigma, levels, rtol=1e-9)
    assert torch.allclose(
        teacher.predict(teacher.net, x, teacher.spec.schedule.grid(18)[9:10], cond), at_one, atol=1e-5
    )
    teacher.use_clock("native")
    assert torch.equal(teacher.spec.schedule(teacher.spec.schedule.grid(18)).sigma, levels)


def test_labels(make_pickle: MakePickle) -> None:
    teacher = load(make_pickle("EDMPrecond", SONG))
    assert teacher.condition([2, 0]).tensors["labels"].tolist() == [[0, 0, 1], [1, 0, 0]]
    for request in (3, -1, "a cat"):
        with pytest.raises(UsageError, match="not a class"):
            teacher.condition([request])
    with pytest.raises(UsageError, match="without label dropout"):
        teacher.condition([None])
    guided = load(make_pickle("EDMPrecond", SONG | {"label_dropout": 0.1}))
    assert guided.condition([None, 1]).tensors["labels"].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert load(make_pickle("EDMPrecond", SONG | {"label_dim": 0})).condition([None]).tensors == {}


def test_the_augmentation_label_is_held_at_zero(make_pickle: MakePickle) -> None:
    teacher = load(make_pickle("EDMPrecond", SONG))
    t, cond = torch.tensor([0.5], dtype=torch.float64), teacher.condition([0])
    x = torch.randn(1, 1, 8, 8)
    before = teacher.predict(teacher.net, x, t, cond)
    with torch.no_grad():
        teacher.net.get_submodule("model.map_augment").weight.fill_(7.0)
    assert torch.equal(teacher.predict(teacher.net, x, t, cond), before)


def test_prediction_works_for_copies_in_half_precision_and_under_autocast(make_pickle: MakePickle) -> None:
    for arguments in (SONG, ADM):
        teacher = load(make_pickle("EDMPrecond", arguments))
        t, cond = torch.tensor([0.5, 0.7], dtype=torch.float64), teacher.condition([0, 1])
        x = torch.randn(2, *teacher.spec.sample_shape)
        with torch.no_grad():
            exact = teacher.predict(teacher.net, x, t, cond)
            half = teacher.predict(copy.deepcopy(teacher.net).bfloat16(), x, t, cond)
            with torch.autocast("cpu", torch.bfloat16):
                cast = teacher.predict(teacher.net, x, t, cond)
        assert half.dtype == cast.dtype == torch.float32
        assert torch.allclose(half, exact, atol=0.1)
        assert torch.allclose(cast, exact, atol=0.1)


def test_a_licence_travels(make_pickle: MakePickle) -> None:
    path = make_pickle()
    assert "licence" not in load(path).describe()
    marked = path.read_bytes()
    note = SOURCE.encode()
    licence = b"# Attribution-NonCommercial-ShareAlike 4.0 International License".ljust(len(note))
    path.write_bytes(marked.replace(note, licence))
    teacher = load(path)
    assert teacher.describe()["licence"] == "cc-by-nc-sa-4.0"
    assert "a student of it inherits that" in teacher.describe()["licence of it"]
    assert build(json.loads(json.dumps(teacher.config()))).describe()["licence"] == "cc-by-nc-sa-4.0"


def test_what_else_is_in_the_file_is_told(make_pickle: MakePickle) -> None:
    assert (
        load(make_pickle(snapshot=True)).describe()["also in the file"]
        == "loss_fn, augment_pipe, dataset_kwargs (left out)"
    )


def test_its_own_form_is_the_same_network(make_pickle: MakePickle, tmp_path: Path) -> None:
    teacher = load(make_pickle("EDMPrecond", SONG))
    again = tmp_path / "again.safetensors"
    teacher.save(again)
    assert family.matches(again)
    copy = load(again)
    assert copy.config() == teacher.config()
    assert all(torch.equal(copy.net.state_dict()[name], tensor) for name, tensor in teacher.net.state_dict().items())
    whole = again.read_bytes()
    for damaged in (whole[:-8], whole.replace(b"EDMPrecond", b"XDMPrecond"), whole[:8] + b"[" * 5000):
        again.write_bytes(damaged)
        with pytest.raises(BootError):
            load(again)


def test_a_folder_with_one_network(make_pickle: MakePickle, tmp_path: Path) -> None:
    path = make_pickle()
    (tmp_path / "recipe.json").write_text('{"steps": 7}')
    assert family.matches(tmp_path)
    assert load(tmp_path).recipe() == {"steps": 7}
    assert load(path).recipe() == {}
    for content, message in (("{", "not readable JSON"), ("[1]", "no table of settings")):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(BootError, match=message):
            load(tmp_path).recipe()
    (tmp_path / "second.pkl").write_bytes(path.read_bytes())
    assert network_file(tmp_path) is None
    with pytest.raises(BootError, match="more than one"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SONG | {"img_channels": 2}, "makes images of 2 channels"),
        (SONG | {"sigma_min": 90.0}, "no noise levels from 90 to 80"),
    ],
)
def test_what_is_no_teacher_of_images_is_refused(
    make_pickle: MakePickle, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BootError, match=f"network.pkl was refused: .*{message}"):
        load(make_pickle("EDMPrecond", arguments))


def test_a_damaged_config_is_refused() -> None:
    for config in (
        {},
        {"class_name": "EDMPrecond", "arguments": 3, "facts": {}},
        {"class_name": "EDMPrecond", "arguments": SONG},
    ):
        with pytest.raises(BootError, match="not valid"):
            build(config)


# --- openai/consistency_models -------------------------------------------------------------------------------------

ADM_BLOCKS: dict[str, Any] = {
    "block_out_channels": (128,) * 4,  # with fewer, EDM takes fewer groups for its norms
    "layers_per_block": 1,
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 32,
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def guided_diffusion_names(net: UNet2DModel) -> dict[str, Tensor]:
    """The weights of diffusers' ADM as guided-diffusion names them: an independent statement of what goes where."""
    state = net.state_dict()
    named: dict[str, Tensor] = {}

    def take(theirs: str, ours: str, parts: Mapping[str, str]) -> None:
        for part, name in parts.items():
            for kind in ("weight", "bias"):
                if f"{theirs}.{part}.{kind}" in state:
                    named[f"{ours}.{name}.{kind}"] = state.pop(f"{theirs}.{part}.{kind}")

    def take_attention(theirs: str, ours: str) -> None:
        if f"{theirs}.to_q.weight" not in state:
            return
        for kind in ("weight", "bias"):
            qkv = torch.cat([state.pop(f"{theirs}.{part}.{kind}") for part in ("to_q", "to_k", "to_v")])
            named[f"{ours}.qkv.{kind}"] = qkv[..., None, None] if kind == "weight" else qkv
            out = state.pop(f"{theirs}.to_out.0.{kind}")
            named[f"{ours}.proj_out.{kind}"] = out[..., None, None] if kind == "weight" else out
            named[f"{ours}.norm.{kind}"] = state.pop(f"{theirs}.group_norm.{kind}")

    for theirs, ours in AROUND.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                named[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
    levels, layers = len(net.config.block_out_channels), net.config.layers_per_block
    place = 1
    for level in range(levels):
        for j in range(layers):
            take(f"down_blocks.{level}.resnets.{j}", f"input_blocks.{place}.0", RESNET)
            take_attention(f"down_blocks.{level}.attentions.{j}", f"input_blocks.{place}.1")
            place += 1
        if level < levels - 1:
            take(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{place}.0", RESNET)
            place += 1
    take("mid_block.resnets.0", "middle_block.0", RESNET)
    take_attention("mid_block.attentions.0", "middle_block.1")
    take("mid_block.resnets.1", "middle_block.2", RESNET)
    place = 0
    for level in range(levels):
        for j in range(layers + 1):
            take(f"up_blocks.{level}.resnets.{j}", f"output_blocks.{place}.0", RESNET)
            attends = f"up_blocks.{level}.attentions.{j}.to_q.weight" in state
            take_attention(f"up_blocks.{level}.attentions.{j}", f"output_blocks.{place}.1")
            if j == layers and level < levels - 1:
                take(f"up_blocks.{level}.upsamplers.0", f"output_blocks.{place}.{1 + attends}", RESNET)
            place += 1
    assert not state, sorted(state)
    return named


def test_an_archive_that_asks_for_much_is_refused_before_it_is_copied() -> None:
    with pytest.raises(ValueError, match="is more numbers than it holds"):
        consistency._renamed({"out.2.weight": torch.zeros(1).expand(10**12)})


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("classes", [5, None])
def test_consistency_models_teachers_are_what_diffusers_makes_of_them(
    tmp_path: Path, scale_shift: bool, classes: int | None
) -> None:
    torch.manual_seed(0)
    kind = "scale_shift" if scale_shift else "default"
    net = UNet2DModel(sample_size=64, num_class_embeds=classes, resnet_time_scale_shift=kind, **ADM_BLOCKS).eval()
    path = tmp_path / "edm_tiny_ema.pt"
    torch.save(guided_diffusion_names(net), path)
    assert family.matches(path)
    teacher = load(path)
    assert teacher.spec.sample_shape == (3, 64, 64)
    assert teacher.spec.num_classes == (classes or 0)
    student = path.rename(tmp_path / "cd_tiny_ema.pt")  # of the same names and shapes
    with pytest.raises(BootError, match="is a consistency model, by its name"):
        load(student)
    student.rename(path)
    assert teacher.architecture.unet.attn_resolutions == [32, 16, 8]
    x, sigma = torch.randn(2, 3, 64, 64), torch.tensor([0.05, 12.0])
    labels = torch.tensor([4, 1]) if classes else None
    onehot = teacher.condition([4, 1]).tensors["labels"] if classes else None
    total = sigma[:, None, None, None] ** 2 + 0.25
    with torch.no_grad():
        drawn = net(x / total.sqrt(), 250 * sigma.log(), class_labels=labels).sample
        expected = 0.25 / total * x + 0.5 * sigma[:, None, None, None] / total.sqrt() * drawn
        assert torch.allclose(teacher.net(x, sigma, onehot), expected, atol=2e-4)


def test_other_archives_are_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    assert not family.matches(path)
    names = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight")
    for shape in ((2, 2, 1, 1), (0, 2, 1, 1), (128, 3, 3, 3)):
        torch.save({name: torch.zeros(shape) for name in names}, path)
        assert not family.matches(path)
        named = path.rename(tmp_path / "edm_other_ema.pt")
        assert family.matches(named)
        with pytest.raises(BootError, match="not laid out"):
            load(named)
    named.write_bytes(named.read_bytes()[:-20])
    assert not family.matches(named)


def test_an_archive_that_is_packed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edm_bomb_ema.pt"
    torch.save({"time_embed.0.weight": torch.zeros(10_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    with pytest.raises(BootError, match="unpacks to more than it holds"):
        load(path)
