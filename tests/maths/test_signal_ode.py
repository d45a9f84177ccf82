"""The Signal-ODE: equal to DDIM, to diffusers and to exact solutions; orders of convergence measured."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import linregress
from torch import Tensor

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.maths.sampling import ddim, ddim_step
from bootcli.maths.schedule import CosineVP, DiscreteVP, LinearPath, Schedule, VarianceExploding, vp_table
from bootcli.maths.signal_ode import (
    Denoiser,
    Solver,
    exact_step,
    from_signal,
    mean_weights,
    solve,
    solve_step,
    step_ratio,
    to_signal,
)

DDPM = vp_table(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SCHEDULES = [LinearPath(), CosineVP(), DDPM, VarianceExploding()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def path(
    f: Denoiser, schedule: Schedule, y: Tensor, eps: Tensor, ends: tuple[float, float], steps: int, solver: Solver
) -> Tensor:
    t, s = (torch.full((len(y),), end, dtype=torch.float64) for end in ends)
    return solve(f, schedule, y, eps, t, s, solver, steps)


def two_clusters(schedule: Schedule) -> GaussianMixtureTeacher:
    means = torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 0.5)]).double()
    return GaussianMixtureTeacher(means, torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.6]), schedule)


@every_schedule
def test_signal_round_trip(schedule: Schedule) -> None:
    y, eps, at = noise(5, 1, 3, 3), noise(5, 1, 3, 3, seed=1), schedule(torch.linspace(0.1, 0.9, 5).double())
    # x_t is as large as sigma * eps: up to 80 on a variance-exploding path.
    assert (to_signal(from_signal(y, eps, at), eps, at) - y).abs().max() < 1e-13
    assert torch.equal(from_signal(y, eps, schedule(torch.zeros(5))), y)


@every_schedule
def test_exact_step_is_the_ddim_step(schedule: Schedule) -> None:
    y, eps, f = (noise(200, 1, 2, 2, seed=seed) for seed in range(3))
    t = torch.linspace(0.05, 1.0, 200, dtype=torch.float64)
    at_t, at_s = schedule(t), schedule(t * 0.8)
    in_signal_space = exact_step(y, f, step_ratio(at_t, at_s))
    x_s = ddim_step(from_signal(y, eps, at_t), f, at_t, at_s)
    # Compared as x_s: y_s costs another division by alpha_s. Relative to the size of its terms.
    error = (from_signal(in_signal_space, eps, at_s) - x_s).abs() / (1 + at_s.sigma.reshape(-1, 1, 1, 1))
    assert error.max() < 2e-15


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_step_is_the_step_of_diffusers(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = DiscreteVP(tuple(scheduler.alphas_cumprod.tolist()))
    scheduler.set_timesteps(10)
    x, f = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1)
    for t, s in pairwise(schedule.grid(10)):
        at_t, at_s = schedule(t.expand(2)), schedule(s.expand(2))
        alpha, sigma = at_t.alpha[0], at_t.sigma[0]
        eps = (x - alpha * f) / sigma
        native = {"epsilon": eps, "sample": f, "v_prediction": alpha * eps - sigma * f}[prediction_type]
        theirs = scheduler.step(native, int(schedule.timestep(t).round()), x).prev_sample
        assert (ddim_step(x, f, at_t, at_s) - theirs).abs().max() < 1e-12
        x = theirs


def test_sampler_is_the_signal_ode_with_euler_steps() -> None:
    teacher, eps = two_clusters(CosineVP()), noise(8, 1, 2, 2)
    times = torch.linspace(0.99, 0.01, 20, dtype=torch.float64)
    at_start, at_end = (CosineVP()(times[i].expand(8)) for i in (0, -1))
    *_, x = ddim(teacher.denoise, CosineVP(), eps, times)
    y = to_signal(eps, eps, at_start)
    for t, s in pairwise(times):
        y = solve_step(teacher.denoise, CosineVP(), y, eps, t.expand(len(y)), s.expand(len(y)), "euler")
    assert (from_signal(y, eps, at_end) - x).abs().max() < 1e-12


def test_sampler_yields_every_state_and_ends_at_x0() -> None:
    point = GaussianTeacher(torch.full((1, 2, 2), 0.7, dtype=torch.float64), 0.0, LinearPath())
    states = list(ddim(point.denoise, LinearPath(), noise(3, 1, 2, 2), LinearPath().grid(4)))
    assert len(states) == 4
    assert (states[-1] - 0.7).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("multistep", 2), ("unipc", 3)]
)
@every_schedule
def test_order_of_convergence(schedule: Schedule, solver: Solver, order: int) -> None:
    """The slope of log error over log step is the order, on a stretch of the path where f is smooth."""
    teacher, eps, y = two_clusters(schedule), noise(8, 1, 2, 2), noise(8, 1, 2, 2, seed=1) / 2
    counts = (32, 64, 128, 256)

    def end(steps: int, solver: Solver) -> Tensor:
        return path(teacher.denoise, schedule, y, eps, (0.7, 0.3), steps, solver)

    reference = end(1024, "unipc")
    errors = [(end(steps, solver) - reference).square().mean().sqrt() for steps in counts]
    slope = linregress([-torch.tensor(n).log2() for n in counts], [error.log2() for error in errors]).slope
    assert abs(slope - order) < 0.2


@pytest.mark.parametrize("solver", ["midpoint", "heun", "multistep", "unipc"])
@every_schedule
def test_an_f_that_is_linear_in_time_is_integrated_exactly(schedule: Schedule, solver: Solver) -> None:
    """In steps of any length: ``d(u y) = f du`` with u = alpha / sigma, here by a fine Riemann-Stieltjes sum."""
    y, eps, start, slope = (noise(2, 1, 2, 2, seed=seed) for seed in range(4))
    ends = (0.8, 0.1)
    times = torch.linspace(*ends, 200_001, dtype=torch.float64)
    at = schedule(times)
    u, middles = at.alpha / at.sigma, (times[1:] + times[:-1]) / 2
    mean = float((u.diff() * middles).sum() / (u[-1] - u[0]))
    exact = (y * u[0] + (start + slope * mean) * (u[-1] - u[0])) / u[-1]

    def linear(x_t: Tensor, t: Tensor) -> Tensor:
        return start + slope * t.reshape(-1, 1, 1, 1)

    for steps in (1, 3):
        assert (path(linear, schedule, y, eps, ends, steps, solver) - exact).abs().max() < 1e-6


@every_schedule
def test_all_weight_of_the_last_step_is_at_the_end_of_the_path(schedule: Schedule) -> None:
    t, s = torch.tensor([0.3, 1e-6]).double(), torch.tensor([0.0, 0.0]).double()
    if float(schedule(s).sigma[0]) == 0:
        assert torch.equal(mean_weights(schedule, t, s, [t, s]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double())
    assert (mean_weights(schedule, t, s, [t, s])[1] >= 0.9).all()


@pytest.mark.parametrize("solver", get_args(Solver))
@every_schedule
def test_gaussian_path_is_reached(schedule: Schedule, solver: Solver) -> None:
    """Many small steps end on the closed form of `GaussianTeacher.exact_signal`, which pins both."""
    start = schedule.time_of(20.0)
    teacher = GaussianTeacher(torch.tensor([[[-0.5, 0.8]]], dtype=torch.float64), 0.4, schedule)
    eps, full = noise(4, 1, 1, 2), torch.full((4,), start, dtype=torch.float64)
    y = teacher.denoise(schedule(full).sigma.reshape(-1, 1, 1, 1) * eps, full)
    assert (y - teacher.exact_signal(eps, full, start)).abs().max() < 1e-14
    y = path(teacher.denoise, schedule, y, eps, (start, start / 10), 200, solver)
    exact = teacher.exact_signal(eps, full / 10, start)
    assert (y - exact).abs().max() < (2e-2 if solver == "euler" else 5e-4)


def test_gaussian_path_at_t_0_is_a_scaled_sample() -> None:
    """On a path with alpha = 0 at the start, y_0 = m + s * eps: data of the right mean and spread."""
    for schedule in (LinearPath(), CosineVP()):
        teacher, eps = GaussianTeacher(torch.zeros(1, 1, 2), 0.4, schedule), noise(4, 1, 1, 2)
        assert (teacher.exact_signal(eps, torch.zeros(4)) - 0.4 * eps).abs().max() < 1e-12


@pytest.mark.parametrize("solver", get_args(Solver))
@pytest.mark.parametrize("schedule", [LinearPath(), CosineVP()], ids=lambda s: type(s).__name__)
def test_both_ends_are_finite(schedule: Schedule, solver: Solver) -> None:
    """alpha = 0 at the start and sigma = 0 at the end, even with a denoiser that is undefined at sigma = 0."""
    teacher, eps = two_clusters(schedule), noise(4, 1, 2, 2)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        undefined = (schedule(t).sigma == 0).reshape(-1, 1, 1, 1)
        return teacher.denoise(x_t, t).masked_fill(undefined, torch.nan)

    y = teacher.denoise(eps, torch.ones(4))
    assert path(denoise, schedule, y, eps, (1.0, 0.0), 10, solver).isfinite().all()


@pytest.mark.parametrize("solver", ["multistep", "unipc"])
def test_multistep_asks_once_a_step(solver: Solver) -> None:
    teacher, asked = two_clusters(DDPM), []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return teacher.denoise(x_t, t)

    path(denoise, DDPM, noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1), (0.8, 0.4), 4, solver)
    assert asked == pytest.approx([0.8, 0.75, 0.7, 0.6, 0.5])


def test_each_sample_steps_from_its_own_time() -> None:
    teacher, y, eps = two_clusters(DDPM), noise(3, 1, 2, 2), noise(3, 1, 2, 2, seed=1)
    t, s = torch.tensor([0.3, 0.6, 0.9]).double(), torch.tensor([0.1, 0.5, 0.0]).double()
    for solver in get_args(Solver):
        together = solve_step(teacher.denoise, DDPM, y, eps, t, s, solver)
        for i in range(3):
            row = slice(i, i + 1)
            alone = solve_step(teacher.denoise, DDPM, y[row], eps[row], t[row], s[row], solver)
            assert (together[row] - alone).abs().max() < 1e-14


def test_step_to_the_same_time_stays() -> None:
    at = DDPM(torch.tensor([0.5]))
    assert torch.equal(exact_step(torch.ones(1, 1), torch.zeros(1, 1), step_ratio(at, at)), torch.ones(1, 1))
