"""The teacher's mathematics against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from bootcli_diffusers.scheduler import process_of, read_process
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler

from bootcli.errors import BootError
from bootcli.maths.prediction import to_x0
from bootcli.maths.sampling import ddim
from bootcli.plugin import Clip, Dynamic, NoThreshold

SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01 * (i + 1) for i in range(20)], "num_train_timesteps": 20},
    {"beta_schedule": "linear", "num_train_timesteps": 100},
]
ZERO_SNR = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def config(**options: Any) -> dict[str, Any]:
    return {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1", **options}


@pytest.mark.parametrize("options", [*SCHEDULES, ZERO_SNR])
def test_the_table_is_the_one_of_diffusers(options: dict[str, Any]) -> None:
    process = read_process(config(**options))
    theirs = DDPMScheduler(**options).alphas_cumprod.double()
    n = len(theirs)
    at = process.table((torch.arange(n, dtype=torch.float64) + 1) / n)
    torch.testing.assert_close(at.alpha**2, theirs, rtol=1e-9, atol=1e-12)
    assert torch.equal(process.table.timestep((torch.arange(n) + 1.0) / n).round(), torch.arange(n).double())


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_that_only_ddpm_knows_become_trained_betas(schedule: str) -> None:
    try:
        theirs = DDPMScheduler(beta_schedule=schedule, num_train_timesteps=50).alphas_cumprod
    except NotImplementedError:
        pytest.skip("diffusers learned laplace in 0.37")
    process = read_process(config(beta_schedule=schedule, num_train_timesteps=50))
    assert process.config["trained_betas"] is not None
    assert process.table.alphas_cumprod == tuple(theirs.tolist())
    assert process_of(process.config) == process


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "SASolver"])
def test_samplers_of_the_same_process_are_read(name: str) -> None:
    """However they sample, and whatever other versions called that."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_schedule="squaredcos_cap_v2")
    ways = {"algorithm_type": "dpmsolver", "solver_order": 7, "timestep_spacing": "other", "use_karras_sigmas": True}
    process = read_process({"_class_name": f"{name}Scheduler", **scheduler.config, **ways})
    assert process.table == read_process(config(beta_schedule="squaredcos_cap_v2")).table
    assert process.threshold == Clip(1.0)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # Heun's scheduler under numpy 2
def test_a_sampler_keeps_its_own_defaults() -> None:
    process = read_process({"_class_name": "HeunDiscreteScheduler"})
    theirs = HeunDiscreteScheduler()
    assert process.config["beta_start"] == 0.00085
    torch.testing.assert_close(torch.tensor(process.table.alphas_cumprod), theirs.alphas_cumprod)
    assert process.threshold == NoThreshold()


def test_thresholds() -> None:
    assert read_process(config(clip_sample_range=2.0)).threshold == Clip(2.0)
    assert read_process(config(clip_sample=False)).threshold == NoThreshold()
    assert read_process({"_class_name": "PNDMScheduler", "clip_sample": False}).threshold == NoThreshold()
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
    process = read_process(config(**dynamic))
    assert process.threshold == Dynamic(0.9, 3.0)
    x = 2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(process.threshold(x), DDPMScheduler(**dynamic)._threshold_sample(x))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("options", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 2.0}])
def test_x0_and_the_ddim_loop_equal_diffusers(prediction: str, options: dict[str, Any]) -> None:
    """Ten trailing steps of a made-up network; diffusers derives the noise from the clipped x_0 if asked to."""
    process = read_process(config(prediction_type=prediction, **options))
    scheduler = DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def net(x_t: torch.Tensor, timestep: float) -> torch.Tensor:
        return torch.tanh(x_t.flip(-1) + timestep / 1000)

    def f(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raw = net(x_t, float(process.table.timestep(t)[0]))
        return process.threshold(to_x0(process.prediction, raw, x_t, process.table(t)))

    ours = list(ddim(f, process.table, x, process.table.grid(10)))
    for timestep, state in zip(scheduler.timesteps, ours, strict=True):
        step = scheduler.step(net(x, float(timestep)), timestep, x, use_clipped_model_output=True)
        t = torch.full((2,), (float(timestep) + 1) / 1000, dtype=torch.float64)
        torch.testing.assert_close(f(x, t), step.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, step.prev_sample, rtol=1e-5, atol=1e-5)
        x = step.prev_sample


def test_continuous_time_is_monotone_between_the_entries() -> None:
    table = read_process(config()).table
    t = torch.linspace(0, 1, 5003, dtype=torch.float64)
    at = table(t)
    assert (at.alpha.diff() < 0).all()
    assert (at.sigma.diff() > 0).all()
    assert (table.timestep(t[10:]).diff() > 0).all()
    assert table.timestep(torch.tensor([0.5005])).item() == pytest.approx(499.5)


def test_zero_terminal_snr_needs_a_prediction_that_survives_it() -> None:
    assert read_process(config(**ZERO_SNR)).table.terminal_snr() == 0
    with pytest.raises(BootError, match="divides by alpha = 0"):
        read_process(config(**ZERO_SNR | {"prediction_type": "epsilon"}))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
        ({"_class_name": ["DDPMScheduler"]}, "is none whose forward process is read"),
        ({"_class_name": "LCMScheduler"}, "distilled to few steps already"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "with timestep_type=continuous"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "with use_flow_sigmas=True"),
        ({"prediction_type": ["epsilon"]}, "prediction_type is"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "magic"}, "magic"),
        ({"beta_start": "a"}, "not valid"),
        ({"num_train_timesteps": -1}, "not valid|falling"),
        ({"num_train_timesteps": None}, "not valid"),
        ({"num_train_timesteps": 10**12}, "has 1000000000000 timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "falling"),
        ({"trained_betas": [0.1, -3.0], "num_train_timesteps": 2}, "falling"),
        ({"trained_betas": [], "num_train_timesteps": 0}, "falling|not valid"),
        ({"clip_sample_range": None}, "not valid"),
    ],
)
def test_a_broken_configuration_is_refused(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(BootError, match=message):
        read_process(config(**broken) | broken)
