"""The teacher itself: prediction, conditions, sites, descriptions."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bootcli_ddpm import family
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

from bootcli.errors import BootError, UsageError
from bootcli.judge import Features
from bootcli.plugin import Cond, check_teacher
from bootcli.student import Student
from bootcli.teachers.feature_folder import (
    CONFIG,
    MANIFOLD,
    REFERENCE,
    WEIGHTS,
    FeatureNetwork,
    save_manifold,
    sha256,
)
from bootcli.teachers.registry import load
from bootcli.teachers.view import TeacherView

from .conftest import MakeFolder

CLASSES = {"num_class_embeds": 4}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("unet", "scheduler"),
    [
        ({}, {}),
        (CLASSES, {"prediction_type": "sample", "thresholding": True}),
        ({"in_channels": 1, "out_channels": 2}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ({"time_embedding_type": "learned", "num_train_timesteps": 50}, {"num_train_timesteps": 50}),
    ],
)
def test_the_whole_contract(make_folder: MakeFolder, unet: dict[str, Any], scheduler: dict[str, Any]) -> None:
    folder = make_folder(unet, scheduler)
    if unet.get("in_channels") == 1:
        write_features(folder / "features")  # its network takes grey images
    assert check_teacher(family.load(folder), family)


def test_the_embedded_teacher() -> None:
    folder = Path(family.aliases["fashion"].source)
    assert family.matches(folder)
    assert check_teacher(family.load(folder), family)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("options", [{}, {"thresholding": True, "sample_max_value": 1.5}])
def test_x0_equals_diffusers(make_folder: MakeFolder, prediction: str, options: dict[str, Any]) -> None:
    folder = make_folder(scheduler={"prediction_type": prediction, **options})
    net = UNet2DModel.from_pretrained(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(10)
    view, x = TeacherView(family.load(folder)), noise(2, 3, 8, 8)
    for timestep in (0, 421, 999):
        with torch.no_grad():
            theirs = scheduler.step(net(x, timestep).sample, timestep, x).pred_original_sample
        ours = view.x0(x, times(*[(timestep + 1) / 1000] * 2), Cond())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_sample_has_its_own_fractional_time(make_folder: MakeFolder) -> None:
    teacher, x = family.load(make_folder()), noise(3, 3, 8, 8)
    t = times(0.5, 0.5004, 0.501)
    with torch.no_grad():
        together = teacher.predict(teacher.net, x, t, Cond())
        apart = torch.cat([teacher.predict(teacher.net, x[i : i + 1], t[i : i + 1], Cond()) for i in range(3)])
        same_x = teacher.predict(teacher.net, x[:1].expand(3, -1, -1, -1), t, Cond())
    torch.testing.assert_close(together, apart)
    assert (same_x[0] - same_x[1]).abs().max() > 1e-7  # timesteps 499 and 499.4: not truncated
    assert (same_x[1] - same_x[2]).abs().max() > 1e-7


def test_a_learned_time_embedding_is_read_between_its_entries(make_folder: MakeFolder) -> None:
    folder = make_folder({"time_embedding_type": "learned", "num_train_timesteps": 1000})
    teacher, x = family.load(folder), noise(2, 3, 8, 8)
    with torch.no_grad():
        theirs = UNet2DModel.from_pretrained(folder / "unet")(x, torch.tensor([499, 999])).sample
        torch.testing.assert_close(teacher.predict(teacher.net, x, times(0.5, 1), Cond()), theirs)
    between, left, right = (teacher.net.time_proj(torch.tensor([timestep])) for timestep in (4.25, 4.0, 5.0))
    torch.testing.assert_close(between, 0.75 * left + 0.25 * right)


def test_prediction_works_for_copies_in_half_precision_and_under_autocast(make_folder: MakeFolder) -> None:
    teacher, x, t = family.load(make_folder()), noise(2, 3, 8, 8), times(0.3, 0.9)
    with torch.no_grad():
        reference = teacher.predict(teacher.net, x, t, Cond())
        half = teacher.predict(copy.deepcopy(teacher.net).bfloat16(), x, t, Cond())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = teacher.predict(copy.deepcopy(teacher.net), x, t, Cond())
    torch.testing.assert_close(half.float(), reference, atol=0.1, rtol=0.1)
    torch.testing.assert_close(mixed.float(), reference, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("scheduler", [{"variance_type": "learned_range"}, {}])
def test_a_learned_variance_is_cut_off(make_folder: MakeFolder, scheduler: dict[str, Any]) -> None:
    folder = make_folder({"out_channels": 6}, scheduler)
    full, teacher, x = UNet2DModel.from_pretrained(folder / "unet"), family.load(folder), noise(2, 3, 8, 8)
    with torch.no_grad():
        ours = teacher.predict(teacher.net, x, times(0.5, 0.5), Cond())
        torch.testing.assert_close(ours, full(x, torch.tensor(499)).sample[:, :3])
    assert teacher.net.config.out_channels == 3
    assert teacher.output_layer(teacher.net).weight.shape[0] == 3


@pytest.mark.parametrize("unet", [CLASSES, CLASSES | {"class_embed_type": "timestep"}])
def test_classes(make_folder: MakeFolder, unet: dict[str, Any]) -> None:
    folder = make_folder(unet)
    teacher, x = family.load(folder), noise(2, 3, 8, 8)
    assert (teacher.spec.conditioning, teacher.spec.num_classes) == ("class", 4)
    cond = teacher.condition([3, 0])
    with torch.no_grad():
        ours = teacher.predict(teacher.net, x, times(0.5, 0.5), cond)
        net = UNet2DModel.from_pretrained(folder / "unet")
        theirs = net(x, torch.tensor(499), class_labels=torch.tensor([3, 0])).sample
        other = teacher.predict(teacher.net, x, times(0.5, 0.5), teacher.condition([1, 0]))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours[0], other[0])
    assert "no guidance" in teacher.describe()["classes"]


@pytest.mark.parametrize("request_", [4, -1, "a cat", None])
def test_what_is_no_class_is_refused(make_folder: MakeFolder, request_: Any) -> None:
    teacher = family.load(make_folder(CLASSES))
    with pytest.raises(UsageError, match="class") as caught:
        teacher.condition([0, request_])
    assert "0 to 3" in caught.value.hint


def test_an_unconditional_teacher_takes_no_class(make_folder: MakeFolder) -> None:
    teacher = family.load(make_folder())
    assert teacher.condition([None, None]) == Cond()
    with pytest.raises(UsageError):
        teacher.condition([1])


@pytest.mark.parametrize(("kind", "message"), [("identity", "embedding vector"), ("timestep", "how many")])
def test_class_embeddings_without_classes(make_folder: MakeFolder, kind: str, message: str) -> None:
    with pytest.raises(BootError, match=message):
        family.load(make_folder({"class_embed_type": kind}))


@pytest.mark.parametrize("unet", [{}, CLASSES, {"time_embedding_dim": 24, "resnet_time_scale_shift": "scale_shift"}])
def test_an_offset_at_the_embedding_site_reaches_every_block(make_folder: MakeFolder, unet: dict[str, Any]) -> None:
    teacher = family.load(make_folder(unet))
    net = copy.deepcopy(teacher.net)
    site, width = teacher.embedding_site(net)
    seen: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if name.endswith("time_emb_proj"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    cond = teacher.condition([1] if unet == CLASSES else [None])
    x, t = noise(1, 3, 8, 8), times(1.0)
    before_output = teacher.predict(net, x, t, cond)
    before = dict(seen)
    site.register_forward_hook(lambda module, args, output: output + torch.ones(1, width))
    after_output = teacher.predict(net, x, t, cond)
    assert before
    assert all(not torch.allclose(before[name], seen[name]) for name in before)
    assert not torch.allclose(before_output, after_output)


def test_a_student_starts_on_the_teacher(make_folder: MakeFolder) -> None:
    teacher = family.load(make_folder(scheduler={"prediction_type": "v_prediction", "clip_sample": False}))
    student, eps = Student(teacher, teacher.head(), t_min=0.001), noise(2, 3, 8, 8)
    assert student.head == "native"
    at_one = TeacherView(teacher).x0(eps, times(1, 1), Cond())
    torch.testing.assert_close(student.sample(eps, Cond()).detach(), at_one)


def test_gradient_checkpointing_changes_nothing_but_memory(make_folder: MakeFolder) -> None:
    teacher, x = family.load(make_folder()), noise(1, 3, 8, 8)
    gradients = []
    for checkpointed in (False, True):
        net = copy.deepcopy(teacher.net).train()
        if checkpointed:
            teacher.enable_gradient_checkpointing(net)
            assert net.is_gradient_checkpointing
        teacher.predict(net, x, times(0.7), Cond()).square().mean().backward()
        gradients.append(net.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(BootError):
        teacher.enable_gradient_checkpointing(torch.nn.Linear(1, 1))


def test_feature_layers_are_those_of_the_way_down(make_folder: MakeFolder) -> None:
    """Also of a network without a middle."""
    for unet, count in (({}, 3), ({"mid_block_type": None}, 2)):
        teacher = family.load(make_folder(unet))
        features = Features(teacher)(torch.randn(2, 3, 8, 8), times(0.1, 0.4), Cond())
        assert [tuple(each.shape) for each in features] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 4, 4)][:count]


def test_a_lora_adapts_what_there_is(make_folder: MakeFolder) -> None:
    teacher = family.load(make_folder())
    names = [name for name, _ in teacher.net.named_modules()]
    assert {"to_q", "conv1", "time_emb_proj", "downsamplers.0.conv"} <= set(teacher.lora_targets())
    assert all(any(name.endswith(target) for name in names) for target in teacher.lora_targets())
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    without = family.load(make_folder(plain))
    assert "conv1" in without.lora_targets()
    assert "to_q" not in without.lora_targets()
    assert without.describe()["attention"] == "no"


@pytest.mark.parametrize("unet", [{}, CLASSES, {"out_channels": 6}, {"sample_size": (8, 16)}])
@pytest.mark.parametrize("scheduler", [{}, {"beta_schedule": "sigmoid", "thresholding": True}])
def test_config_and_build_are_a_round_trip(
    make_folder: MakeFolder, unet: dict[str, Any], scheduler: dict[str, Any]
) -> None:
    teacher = family.load(make_folder(unet, scheduler))
    stored = json.loads(json.dumps(teacher.config()))
    built = family.build(stored)
    assert built.spec == teacher.spec
    assert built.config() == teacher.config() == stored
    built.net.load_state_dict(teacher.net.state_dict())
    assert not built.net.training
    assert built.feature_space() is None


@pytest.mark.parametrize("part", ["unet", "scheduler", "card"])
def test_an_incomplete_config_is_refused(make_folder: MakeFolder, part: str) -> None:
    config = family.load(make_folder()).config()
    for damaged in ({**config, part: 3}, {name: value for name, value in config.items() if name != part}):
        with pytest.raises(BootError, match=part if part not in damaged else "incomplete"):
            family.build(damaged)


def test_description_and_card(make_folder: MakeFolder) -> None:
    folder = make_folder()
    assert "licence" not in family.load(folder).describe()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    facts = family.load(folder).describe()
    assert facts["licence"] == "apache-2.0"
    assert facts["schedule"] == "linear betas, 1000 timesteps"
    assert facts["range of x_0"] == "clipped to [-1, 1]"
    assert facts["architecture"].startswith("UNet2DModel, ")
    endless = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijklmn"))
    many = f"---\na: &a [x]\n{endless}license: *n\n---\n".encode()  # 9^13 of them
    for junk in (b"---\n{ license: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"", many):
        (folder / "README.md").write_bytes(junk)
        assert "licence" not in family.load(folder).describe()


def test_the_source_is_read_from_the_hub_cache(make_folder: MakeFolder, tmp_path: Path) -> None:
    cached = tmp_path / "models--google--ddpm-cifar10-32" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    make_folder().rename(cached)
    assert family.load(cached).describe()["source"] == "google/ddpm-cifar10-32"


def write_features(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    network = FeatureNetwork(channels=(2, 2), features=4, classes=3, size=8)
    save_file(network.state_dict(), folder / WEIGHTS)
    save_file({"mean": torch.zeros(4).double(), "cov": torch.eye(4).double()}, folder / REFERENCE)
    architecture = {"channels": [2, 2], "features": 4, "classes": 3, "size": 8}
    config = {"name": "tiny", "architecture": architecture, "reference_images": 60, "floor": {"50": 0.2, "100": 0.1}}
    config |= {"sha256": sha256(folder / WEIGHTS)} | changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_feature_space(make_folder: MakeFolder) -> None:
    folder = make_folder()
    assert family.load(folder).feature_space() is None
    write_features(folder / "features")
    space = family.load(folder).feature_space()
    assert space is not None
    assert (space.name, space.num_images, space.floor) == ("tiny", 60, {50: 0.2, 100: 0.1})
    assert space.network(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert space.mean.dtype == torch.float64
    assert space.features is None, "a folder without single features is whole"
    save_manifold(folder / "features", torch.eye(4))
    again = family.load(folder).feature_space()
    assert again is not None
    assert again.features is not None
    assert torch.equal(again.features, torch.eye(4).half())


def test_features_of_another_network_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    write_features(folder / "features")
    path = folder / "features" / MANIFOLD
    save_file({"features": torch.eye(4)}, path, {"network": "0123"})
    with pytest.raises(BootError, match="holds features of another network"):
        family.load(folder).feature_space()
    path.write_bytes(b"half a file")
    with pytest.raises(BootError, match="features is damaged"):
        family.load(folder).feature_space()


def test_the_embedded_features_are_of_the_reference_images() -> None:
    """10,000 of the 60,000: mean and covariance are those of the reference as far as chance allows."""
    space = load("fashion").teacher.feature_space()
    assert space is not None
    assert space.features is not None
    assert space.features.shape == (10_000, 64)
    features = space.features.double()
    error = (features.mean(0) - space.mean) / (space.cov.diagonal() / 10_000).sqrt()
    assert error.abs().max() < 4
    assert torch.allclose(features.T.cov().diagonal(), space.cov.diagonal(), rtol=0.1)


@pytest.mark.parametrize("changes", [{"sha256": ""}, {"reference_images": None}, {"architecture": {"size": "a"}}])
def test_a_damaged_feature_space(make_folder: MakeFolder, changes: dict[str, Any]) -> None:
    folder = make_folder()
    write_features(folder / "features", **changes)
    with pytest.raises(BootError, match="features is damaged"):
        family.load(folder).feature_space()
