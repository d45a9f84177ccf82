"""diffusers' scheduler configs to what bootcli computes with: a table, a prediction type, a threshold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import DDIMScheduler
from torch import Tensor

from bootcli.plugin import BootError, Clip, DiscreteVP, Dynamic, NoThreshold, PredictionType, Threshold

# Different samplers of the same forward process: betas, and a network that sees the variance-preserving x_t.
_CLASSES = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LMSDiscrete", "UniPCMultistep", "DEISMultistep"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "SASolver"),
    )
)
_OF_STUDENTS = frozenset({"LCMScheduler", "TCDScheduler"})
_PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_ELSEWHERE: dict[str, tuple[object, ...]] = {"timestep_type": ("continuous",), "use_flow_sigmas": (True,)}
"""Options under which the network of one of these sees other noise or other times."""
_MOST_TIMESTEPS = 100_000
"""More than any model has; a table of what a file asks for is made before anything else is known of it."""
_DDIM_BETAS = frozenset({"linear", "scaled_linear", "squaredcos_cap_v2"})


@dataclass(frozen=True)
class Process:
    """A teacher's forward process and the meaning of its network's output.

    Args:
        config: keyword arguments of diffusers' `DDIMScheduler`, complete and JSON-able.
        table: alphas_cumprod.
        prediction: what the network predicts.
        threshold: how x_0 is kept in range.
    """

    config: dict[str, Any]
    table: DiscreteVP
    prediction: PredictionType
    threshold: Threshold

    def one_step(self, *, predicts_sample: bool) -> DDIMScheduler:
        """A scheduler whose one step is a student's head: the last timestep, down to clean data, unclipped on the way.

        Args:
            predicts_sample: whether the network's output is the sample, and not what the teacher predicts.
        """
        config = self.config | {
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "clip_sample": False,
            "thresholding": False,
        }
        if predicts_sample:
            config["prediction_type"] = "sample"
        return DDIMScheduler(**config)

    @property
    def summary(self) -> str:
        """One line for people: "linear betas, 1000 timesteps"."""
        kind = "trained" if self.config["trained_betas"] is not None else self.config["beta_schedule"]
        snr = ", zero terminal SNR" if self.config["rescale_betas_zero_snr"] else ""
        return f"{kind} betas, {self.table.num_timesteps} timesteps{snr}"


def init_arguments(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``config`` that the constructor of ``kind`` takes; diffusers ignores the others, too."""
    return {name: config[name] for name in inspect.signature(kind).parameters if name in config}


def read_process(config: Mapping[str, Any]) -> Process:
    """The process behind a scheduler_config.json of any class that shares DDPM's forward process.

    Whatever sampler a folder names, the teacher is that model under DDIM, with the options that diffusers'
    `DDIMPipeline` would give it: where a sampler knows no clip_sample, x_0 is clipped to [-1, 1]. Raises `BootError`
    for another class, unreadable values or an impossible combination.
    """
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name in _OF_STUDENTS:
        raise BootError(
            f"The scheduler {name} is that of a model which was distilled to few steps already.",
            "Distil the model that it was made from.",
        )
    elsewhere = next((f"{key}={config[key]}" for key, values in _ELSEWHERE.items() if config.get(key) in values), "")
    if name not in _CLASSES or elsewhere:
        raise BootError(
            f"The scheduler {name}{' with ' if elsewhere else ''}{elsewhere} is none whose forward process is read.",
            f"Those that are, in timesteps of DDPM: {', '.join(sorted(_CLASSES))}.",
        )
    kind = getattr(diffusers, name)
    _check_length(config)
    try:
        # The named class fills in its own defaults (Heun's betas, for one, are not DDIM's), but is told of the forward
        # process alone: how it samples does not matter, and may be an option of another version.
        wanted = inspect.signature(DDIMScheduler).parameters
        own = kind(**{key: value for key, value in init_arguments(kind, config).items() if key in wanted})
        return process_of(_as_ddim({**config, **own.config}, own.betas))
    except BootError:
        raise
    except Exception as error:  # values of any kind come from the file, and diffusers checks few of them
        raise _broken(error) from None


def process_of(config: Mapping[str, Any]) -> Process:
    """The process of complete `DDIMScheduler` arguments, as stored in ``Process.config``."""
    prediction = _PREDICTIONS.get(str(config["prediction_type"]))
    if prediction is None:
        raise BootError(
            f"The scheduler's prediction_type is {config['prediction_type']!r}.",
            f"Known are {', '.join(_PREDICTIONS)}.",
        )
    _check_length(config)
    try:
        alphas_cumprod = DDIMScheduler(**config).alphas_cumprod
        threshold = _threshold(config)
    except Exception as error:  # as above
        raise _broken(error) from None
    _check_table(alphas_cumprod, config, prediction)
    return Process(dict(config), DiscreteVP(tuple(alphas_cumprod.tolist())), prediction, threshold)


def _as_ddim(own: Mapping[str, Any], betas: Tensor) -> dict[str, Any]:
    defaults = inspect.signature(DDIMScheduler).parameters
    config = {name: own.get(name, parameter.default) for name, parameter in defaults.items()}
    if config["trained_betas"] is None and config["beta_schedule"] not in _DDIM_BETAS:
        # DDPMScheduler knows more schedules than DDIMScheduler: hand over the betas themselves.
        config |= {"trained_betas": betas.tolist(), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    return config


def _check_length(config: Mapping[str, Any]) -> None:
    count = config.get("num_train_timesteps")
    if isinstance(count, int | float) and count > _MOST_TIMESTEPS:
        raise BootError(
            f"The scheduler has {count} timesteps.", f"bootcli reads tables of {_MOST_TIMESTEPS:,} at most."
        )


def _check_table(alphas_cumprod: Tensor, config: Mapping[str, Any], prediction: PredictionType) -> None:
    if len(alphas_cumprod) != config["num_train_timesteps"]:
        raise BootError(
            f"The scheduler has {len(alphas_cumprod)} trained_betas for {config['num_train_timesteps']} timesteps.",
            "Correct num_train_timesteps in scheduler_config.json.",
        )
    inside = (alphas_cumprod >= 0) & (alphas_cumprod < 1)  # False for NaN as well
    falling = alphas_cumprod.diff() <= 0
    if not (len(alphas_cumprod) and inside.all() and falling.all() and alphas_cumprod[0] > 0):
        raise BootError(
            "The scheduler's betas do not give a falling table of alphas_cumprod in [0, 1).",
            "Correct the betas in scheduler_config.json: each lies between 0 and 1.",
        )
    if prediction == "eps" and bool((alphas_cumprod == 0).any()):
        raise BootError(
            "The scheduler ends in pure noise (zero terminal SNR), where an epsilon prediction says nothing about "
            "the image: x_0 = (x_t - sigma * eps) / alpha divides by alpha = 0.",
            "Such a model predicts v or the sample. If this one was trained on epsilon, its scheduler_config.json "
            'should say "rescale_betas_zero_snr": false.',
        )


def _threshold(config: Mapping[str, Any]) -> Threshold:
    if config["thresholding"]:
        return Dynamic(float(config["dynamic_thresholding_ratio"]), float(config["sample_max_value"]))
    return Clip(float(config["clip_sample_range"])) if config["clip_sample"] else NoThreshold()


def _broken(error: Exception) -> BootError:
    reason = f"{type(error).__name__}: {error}"
    return BootError(f"The scheduler's configuration is not valid ({reason}).", "Correct scheduler_config.json.")
