"""Noise schedules against their definitions and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from bootcli.maths.schedule import CosineVP, DiscreteVP, LinearPath, Schedule, VarianceExploding, vp_table

DDPM = vp_table(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
ZERO_SNR = DiscreteVP((*(math.cos(math.pi / 2 * (i + 1) / 100) ** 2 for i in range(99)), 0.0))
SCHEDULES: dict[str, Schedule] = {
    "linear": LinearPath(),
    "cosine": CosineVP(),
    "ddpm": DDPM,
    "zero-snr": ZERO_SNR,
    "ve": VarianceExploding(),
    "ve in log sigma": VarianceExploding(log=True),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def at(schedule: Schedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule(torch.tensor([t], dtype=torch.float64))
    return float(alpha), float(sigma)


@every_schedule
def test_runs_from_data_to_noise(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 5001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert at(schedule, 0.0) == (1.0, 0.0)
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    assert (alpha.diff() <= 0).all()
    assert (torch.atan2(sigma, alpha).diff() > 0).all()


@every_schedule
def test_keeps_the_shape_of_t_and_computes_in_float64(schedule: Schedule) -> None:
    for shape in ((), (3,), (2, 5)):
        alpha, sigma = schedule(torch.full(shape, 0.3, dtype=torch.float32))
        assert alpha.shape == sigma.shape == shape
        assert alpha.dtype == sigma.dtype == torch.float64


@pytest.mark.parametrize("name", ["cosine", "ddpm", "zero-snr"])
def test_vp_keeps_variance(name: str) -> None:
    alpha, sigma = SCHEDULES[name](torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert ((alpha**2 + sigma**2) - 1).abs().max() < 1e-15


def test_table_is_exact_at_its_entries() -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    squared = torch.tensor(DDPM.alphas_cumprod, dtype=torch.float64)
    alpha, sigma = DDPM(t)
    assert (alpha / squared.sqrt() - 1).abs().max() < 1e-13
    assert (sigma / (1 - squared).sqrt() - 1).abs().max() < 1e-13
    assert torch.allclose(DDPM.timestep(t), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-12)


def test_table_between_entries_is_between_their_angles() -> None:
    angle = torch.atan2(*reversed(DDPM(torch.tensor([0.5, 0.50025, 0.501], dtype=torch.float64))))
    assert float((angle[1] - angle[0]) / (angle[2] - angle[0])) == pytest.approx(0.25)


def test_table_from_betas_is_the_scheduler_of_diffusers() -> None:
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod.double()
    ours = torch.tensor(DDPM.alphas_cumprod, dtype=torch.float64)
    assert (ours / theirs - 1).abs().max() < 1e-4  # theirs is a product of 1000 float32 numbers


@pytest.mark.parametrize("n", [1000, 400])
def test_grid_is_trailing_spacing_of_diffusers(n: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=n, timestep_spacing="trailing")
    table = DiscreteVP(tuple(torch.linspace(0.999, 0.001, n).tolist()))
    for steps in range(1, n + 1):
        scheduler.set_timesteps(steps)
        times = table.grid(steps)
        assert times[0] == 1
        assert times[-1] == 0
        # Where 1 / steps rounds badly, theirs has one entry too many at the end: timestep -1.
        assert (table.timestep(times[:-1]).round().long() == scheduler.timesteps[:steps]).all(), steps


@every_schedule
def test_grid_falls_from_noise_to_data(schedule: Schedule) -> None:
    for steps in (1, 2, 7, 50):
        times = schedule.grid(steps)
        assert times.shape == (steps + 1,)
        assert (times[0], times[-1]) == (1, 0)
        assert (times.diff() < 0).all()


def test_grid_of_edm_is_equation_5() -> None:
    schedule, steps = VarianceExploding(sigma_min=0.002, sigma_max=80.0, rho=7.0), 18
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    levels = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    assert schedule(schedule.grid(steps)).sigma.tolist() == pytest.approx([*levels, 0.0], rel=1e-9)


@pytest.mark.parametrize(("gain", "about"), [(20.0, 0.77), (2.0, 0.40)])
def test_time_of_a_gain_of_linear_betas(gain: float, about: float) -> None:
    """The bound falls between the last table entry that keeps it and the first that does not."""
    found = DDPM.time_of(gain)
    kept = sum((1 - squared) / squared <= gain**2 for squared in DDPM.alphas_cumprod)
    assert kept / 1000 <= found < (kept + 1) / 1000
    assert found == pytest.approx(about, abs=0.005)
    (alpha, sigma), (alpha_above, sigma_above) = at(DDPM, found), at(DDPM, found + 1e-9)
    assert sigma / alpha <= gain < sigma_above / alpha_above


def test_time_of_is_1_where_the_gain_is_bounded_everywhere() -> None:
    assert VarianceExploding().time_of(80.0) == 1.0
    assert DDPM.time_of(1e3) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_a_noise_level(name: str) -> None:
    schedule = SCHEDULES[name]
    for ratio in (0.1, 0.5, 2.0):
        alpha, sigma = at(schedule, schedule.time_of(ratio))
        assert sigma / alpha == pytest.approx(ratio, rel=1e-6)
    assert schedule.time_of(1e12) == pytest.approx(1.0)


def test_zero_terminal_snr_is_finite() -> None:
    for name in ("linear", "cosine", "zero-snr"):
        alpha, sigma = at(SCHEDULES[name], 1.0)
        assert (alpha, sigma) == (0, 1)
        assert SCHEDULES[name].terminal_snr() == 0
    assert DDPM.terminal_snr() == pytest.approx(4.04e-5, rel=0.01)


def test_equal_by_value() -> None:
    assert DiscreteVP((0.9, 0.5)) == DiscreteVP((0.9, 0.5)) != DiscreteVP((0.9, 0.4))
    assert CosineVP() != LinearPath()
