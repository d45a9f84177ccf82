"""The networks against real ones, and their parts against what they should do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import train_edm_teacher
from bootcli_edm.architecture import Architecture
from bootcli_edm.layers import PositionalEmbedding, ResampleConv2d
from bootcli_edm.preconditioning import EDM, IDDPM, VE, VP, Preconditioned, Preconditioning
from bootcli_edm.refusal import Refused
from safetensors.torch import load_file
from torch import Tensor

from .conftest import ADM, REFERENCE, SONG

REAL = sorted(path.stem for path in REFERENCE.glob("*.json"))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def load_real(name: str) -> tuple[Architecture, dict[str, Tensor], list[float]]:
    facts = json.loads((REFERENCE / f"{name}.json").read_text())
    return (
        Architecture(facts["precond"], facts["kwargs"]),
        load_file(REFERENCE / f"{name}.safetensors"),
        facts["sigmas"],
    )


@pytest.mark.parametrize("name", REAL)
def test_real_networks_give_what_they_gave(name: str) -> None:
    architecture, tensors, sigmas = load_real(name)
    net = architecture.load({key[4:]: tensor for key, tensor in tensors.items() if key.startswith("net.")})
    for i, sigma in enumerate(sigmas):
        x, expected = tensors[f"io.x_{i}"], tensors[f"io.denoised_{i}"]
        with torch.no_grad():
            denoised = net(x, torch.full((len(x),), sigma), tensors.get("io.class_labels"))
        assert (denoised - expected).abs().max() <= 1e-5 * expected.abs().max(), f"sigma = {sigma}"
        assert not torch.equal(denoised, x)


def test_there_are_real_networks() -> None:
    assert len(REAL) == 4


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_every_layout_of_a_song_unet_runs(encoder: str, decoder: str, taps: list[int]) -> None:
    options = {"encoder_type": encoder, "decoder_type": decoder, "resample_filter": taps, "channel_mult": [1, 1, 2]}
    torch.manual_seed(0)
    net = Architecture("VEPrecond", SONG | options | {"embedding_type": "fourier", "channel_mult_noise": 2}).build()
    names = {
        name.split(".")[2] for name in net.state_dict() if name.startswith("model.enc") or name.startswith("model.dec")
    }
    assert ("4x4_aux_skip" in names) == (encoder == "skip")
    assert ("4x4_aux_residual" in names) == (encoder == "residual")
    assert ("4x4_aux_conv" in names) == (decoder == "skip")
    x = noise(2, 1, 8, 8)
    denoised = net(x, torch.tensor([0.1, 20.0]), torch.eye(3)[:2])
    assert denoised.shape == x.shape
    denoised.square().mean().backward()
    unused = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert unused == []


@pytest.mark.parametrize("side", [6, 8])
def test_two_taps_are_a_mean_and_a_repetition(side: int) -> None:
    x = noise(2, 3, side, side)
    down, up = (ResampleConv2d(3, 3, 0, way, (1, 1)) for way in ("down", "up"))
    box = torch.ones(3, 1, 2, 2)
    assert torch.allclose(down(x), F.conv2d(x, box / 4, stride=2, groups=3), atol=1e-6)
    assert torch.allclose(up(x), F.conv_transpose2d(x, box, stride=2, groups=3), atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 1, 1, 1)])
def test_a_fused_resampling_pads_once(taps: tuple[int, ...]) -> None:
    fused = ResampleConv2d(2, 3, 3, "down", taps, fused=True)
    x = noise(1, 2, 8, 8)
    line = torch.tensor(taps, dtype=torch.float32)
    smooth = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, -1, -1)
    padded = F.pad(x, [1 + (len(taps) - 1) // 2] * 4)
    expected = F.conv2d(F.conv2d(padded, fused.weight), smooth, stride=2, groups=3) + fused.bias[:, None, None]
    assert fused(x).shape == (1, 3, 4, 4)
    assert torch.allclose(fused(x), expected, atol=1e-5)


@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)])
def test_resampling_keeps_a_flat_picture_away_from_the_border(way: Any, taps: tuple[int, ...]) -> None:
    x = torch.ones(1, 2, 16, 16)
    y = ResampleConv2d(2, 2, 0, way, taps)(x)
    assert y.shape[-1] == (8 if way == "down" else 32)
    assert torch.allclose(y[..., 3:-3, 3:-3], torch.ones(1), atol=1e-6)


def test_the_positional_embedding_ends_where_it_should() -> None:
    label = torch.tensor([1.0])
    with_end, without = (PositionalEmbedding(8, endpoint=endpoint)(label)[0] for endpoint in (True, False))
    assert with_end[3] == pytest.approx(math.cos(1e-4))
    assert without[7] == pytest.approx(math.sin(1e-3), rel=1e-4)  # the fifth frequency would be 1e-4
    assert with_end[0] == without[0] == pytest.approx(math.cos(1))


def gaussian_denoiser(x: Tensor, sigma: Tensor, std: float) -> Tensor:
    """The best D for data N(0, std^2): x std^2 / (std^2 + sigma^2)."""
    return x * (std**2 / (std**2 + sigma**2))[:, None, None, None]


def test_edm_scalings_keep_the_variance_of_input_and_target() -> None:
    sigma = torch.tensor([0.002, 0.3, 80.0])
    c_skip, c_out, c_in, c_noise = EDM().scalings(sigma, torch.empty(0))
    assert torch.allclose(c_in**2 * (sigma**2 + 0.25), torch.ones(3))
    target = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2
    assert torch.allclose(target, torch.ones(3), rtol=1e-4)
    assert torch.allclose(c_noise, sigma.log() / 4)
    assert torch.allclose(EDM(noise_scale=250).scalings(sigma, torch.empty(0)).c_noise, 250 * sigma.log())


def test_vp_labels_are_its_times() -> None:
    vp = VP()
    low, high = vp.levels
    assert low == pytest.approx(1e-3, rel=0.02)
    assert high == pytest.approx(152, rel=0.01)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    sigma = torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t).sqrt()
    assert torch.allclose(vp.scalings(sigma, torch.empty(0)).c_noise, 999 * t)


def test_iddpm_knows_its_table() -> None:
    table = IDDPM().table()
    assert len(table) == 1001
    assert table[-1] == 0
    assert (table.diff() < 0).all()
    assert IDDPM().levels == (pytest.approx(0.0064, rel=0.05), pytest.approx(20291, rel=0.01))  # EDM, table 1
    labels = IDDPM().scalings(table[[0, 500, 999]], table).c_noise
    assert labels.tolist() == [999, 499, 0]


@pytest.mark.parametrize("preconditioning", [VP(), VE(), IDDPM()])
def test_the_noise_agrees_with_the_denoiser(preconditioning: Preconditioning) -> None:
    def model(x: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([x.sin() + 0.01 * labels[:, None, None, None], x], dim=1)

    net = Preconditioned(model, preconditioning, 2)  # type: ignore[arg-type]  # a function will do
    net.register_parameter("dtype", torch.nn.Parameter(torch.zeros(1)))
    x, sigma = noise(3, 2, 4, 4), torch.tensor([0.05, 1.0, 30.0])
    eps = net(x, sigma, as_noise=True)
    assert torch.allclose(net(x, sigma), x - sigma[:, None, None, None] * eps, atol=1e-4)


def test_weights_must_fit() -> None:
    architecture = Architecture("EDMPrecond", SONG)
    tensors = architecture.build().state_dict()
    loaded = architecture.load(tensors).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    name = "model.enc.8x8_conv.weight"
    with pytest.raises(Refused, match=r"1 missing \(model.enc.8x8_conv.weight\)"):
        architecture.load({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(Refused, match=r"1 unknown \(more\)"):
        architecture.load(tensors | {"more": torch.zeros(1)})
    with pytest.raises(Refused, match="of another shape"):
        architecture.load(tensors | {name: torch.zeros(1)})
    with pytest.raises(Refused, match="finite"):
        architecture.load(tensors | {name: torch.full_like(tensors[name], torch.nan)})


@pytest.mark.parametrize(
    ("class_name", "arguments", "message"),
    [
        ("Precond", SONG, "'Precond'"),
        ("EDMPrecond", SONG | {"num_blocks": 10**9}, "num_blocks = 1000000000"),
        ("EDMPrecond", SONG | {"model_channels": -8}, "model_channels"),
        ("EDMPrecond", SONG | {"channel_mult": []}, "channel_mult"),
        ("EDMPrecond", SONG | {"sigma_data": float("nan")}, "sigma_data"),
        ("VPPrecond", SONG | {"beta_d": 1e4}, "beta_d"),
        ("VPPrecond", SONG | {"beta_d": 400.1, "beta_min": 400.0}, "beta_d"),  # e^600 is a number, e^750 none
        ("VPPrecond", SONG | {"epsilon_t": 1e9}, "epsilon_t"),
        ("iDDPMPrecond", ADM | {"C_1": 2.0}, "C_1"),
        ("iDDPMPrecond", ADM | {"C_2": float("inf")}, "C_2"),
        ("EDMPrecond", SONG | {"sigma_data": "big"}, "sigma_data"),
        ("EDMPrecond", SONG | {"wings": 2}, "wings = 2"),
        (
            "EDMPrecond",
            {name: value for name, value in SONG.items() if name != "img_channels"},
            "img_channels: field req",
        ),
        ("VPPrecond", SONG | {"sigma_data": 1.0}, "sigma_data"),
        ("EDMPrecond", ADM | {"encoder_type": "skip"}, "encoder_type"),
    ],
)
def test_arguments_are_checked(class_name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Architecture(class_name, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        SONG | {"img_resolution": 7},
        SONG | {"model_channels": 7},
        SONG | {"model_channels": 24, "channel_mult": [1, 2, 4], "img_resolution": 16},  # 144 channels in 32 groups
        SONG | {"resample_filter": [1, 2, 1]},
        ADM | {"model_channels": 224, "channel_mult": [1, 1]},  # heads of 64 channels and a rest
    ],
)
def test_layers_that_do_not_fit_each_other_are_found(arguments: dict[str, Any]) -> None:
    architecture = Architecture("EDMPrecond", arguments)
    for make in (architecture.build, lambda: architecture.load({})):
        with pytest.raises(Refused, match=r"the network that it describes (cannot be built|turns)"):
            make()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_arguments_may_have_no_names(count: int) -> None:
    order = (
        "img_resolution",
        "img_channels",
        "label_dim",
        "use_fp16",
        "sigma_min",
        "sigma_max",
        "sigma_data",
        "model_type",
    )
    full = {"use_fp16": True, "sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.6} | SONG
    positional = [full[name] for name in order[:count]]
    named = {name: value for name, value in full.items() if name not in order[:count]}
    assert Architecture("EDMPrecond", named, positional).arguments == Architecture("EDMPrecond", full).arguments
    with pytest.raises(Refused, match="twice"):
        Architecture("EDMPrecond", full, positional)
    with pytest.raises(Refused, match="one too many"):
        Architecture("EDMPrecond", {}, [8, 1, 3, False, 0.0, 80.0, 0.5, "SongUNet", 0.25, 7])


def test_no_labels_are_rows_of_zeros() -> None:
    """And so the bias of their layer is in it, as in EDM's code."""
    torch.manual_seed(0)
    net = Architecture("EDMPrecond", SONG).build()
    x, sigma = noise(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    assert torch.equal(net(x, sigma), net(x, sigma, torch.zeros(2, 3)))
    assert not torch.equal(net(x, sigma), net(x, sigma, torch.eye(3)[:2]))


def test_a_lie_about_sizes_costs_no_memory() -> None:
    size = {"model_channels": 4096, "channel_mult": [1, 1], "num_blocks": 1, "augment_dim": 0}
    huge = Architecture("EDMPrecond", SONG | size)
    with pytest.raises(Refused, match="do not fit"):
        huge.load({})
    number = torch.zeros(1)
    shapes = {name: tensor.shape for name, tensor in huge._sketch().state_dict().items()}
    with pytest.raises(Refused, match="more numbers than it holds"):  # 4 billion of them, and all are the same one
        huge.load({name: number.expand(shape) for name, shape in shapes.items()})


def test_reference_files_are_small() -> None:
    assert sum(Path(path).stat().st_size for path in REFERENCE.iterdir()) < 8e6


def test_the_network_of_the_embedded_teacher_can_be_trained_and_sampled() -> None:
    net = train_edm_teacher.architecture().build()
    drawn = train_edm_teacher.sample(net, noise(3, 1, 16, 16), [0, 4, 9], steps=2)
    assert drawn.shape == (3, 1, 16, 16)
    assert drawn.isfinite().all()
