"""The half of the conformance kit that runs the network: the probe it measures with, and a function per clause."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bootcli.errors import BootError, UsageError
from bootcli.maths.schedule import DiscreteVP
from bootcli.teachers.family import TeacherFamily
from bootcli.teachers.protocol import Cond, Conditioning, Teacher
from bootcli.teachers.view import TeacherView


class ConformanceError(BootError, AssertionError):
    """A teacher breaks a clause; the message begins with the clause's name."""


@dataclass(frozen=True)
class Probe:
    """One teacher with inputs to try it on: two samples, a condition for each.

    Args:
        teacher: the teacher under test, its network on ``device``.
        family: what registers it, or None to leave out the clauses that need it.
        device: where the network runs.
    """

    teacher: Teacher
    family: TeacherFamily | None
    device: torch.device

    @cached_property
    def x_t(self) -> Tensor:
        """Two noisy samples, (2, c, h, w)."""
        noise = torch.randn(2, *self.teacher.spec.sample_shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device)

    @cached_property
    def cond(self) -> Cond:
        """Two valid conditions."""
        spec = self.teacher.spec
        requests: dict[Conditioning, list[int | str | None]] = {
            "none": [None, None],
            "class": [0, spec.num_classes - 1],
            "text": ["a photo of a cat", "two red cubes"],
        }
        return self.teacher.condition(requests[spec.conditioning]).to(self.device)

    def predict(self, *times: float, net: nn.Module | None = None, rows: slice = slice(2)) -> Tensor:
        """The raw prediction without gradient for the samples ``rows``; one time for all, or one for each."""
        x_t, cond = self.x_t[rows].clone(), self.cond.rows(torch.arange(2)[rows])
        t = torch.tensor(times, dtype=torch.float64).expand(len(x_t)).clone()
        with torch.no_grad():
            return self.teacher.predict(self.teacher.net if net is None else net, x_t, t, cond)

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Equal up to what another batch size does to the rounding of a network."""
        tolerance = 1e-4 if self.device.type == "cpu" else 1e-2
        return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))

    @cached_property
    def depends_on_time(self) -> bool:
        """Whether the network looks at t at all."""
        return not torch.equal(self.predict(0.25), self.predict(0.75))


Clause = Callable[[Probe], None]


def need(holds: object, sentence: str) -> None:
    """Raise with ``sentence`` unless the clause holds."""
    if not holds:
        raise ConformanceError(sentence)


def finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def net_is_ready(probe: Probe) -> None:
    """The network is in eval mode throughout and its weights are finite."""
    for name, module in probe.teacher.net.named_modules():
        need(not module.training, f"module {name or 'net'!r} is in training mode.")
    for name, tensor in probe.teacher.net.state_dict().items():
        need(not tensor.is_floating_point() or finite(tensor), f"{name} holds NaN or infinity.")


def prediction_has_shape_of_sample(probe: Probe) -> None:
    """predict gives finite floats of the shape of x_t, at t = 1 and at times between a table's entries."""
    for t in (0.0137, 0.4321, 0.98765, 1.0):
        prediction = probe.predict(t)
        need(prediction.shape == probe.x_t.shape, f"predict gives {tuple(prediction.shape)} at t = {t}.")
        need(prediction.is_floating_point() and finite(prediction), f"predict is not finite floats at t = {t}.")


def predict_is_deterministic(probe: Probe) -> None:
    """The same arguments give the same prediction."""
    need(probe.same(probe.predict(0.5), probe.predict(0.5)), "two calls with the same arguments differ.")


def inputs_are_left_alone(probe: Probe) -> None:
    """predict does not write to x_t, t or the condition."""
    x_t, t = probe.x_t.clone(), torch.tensor([0.3, 0.6], dtype=torch.float64)
    cond = Cond({name: tensor.clone() for name, tensor in probe.cond.tensors.items()})
    with torch.no_grad():
        probe.teacher.predict(probe.teacher.net, x_t, t, cond)
    need(torch.equal(x_t, probe.x_t), "predict changes x_t in place.")
    need(t.tolist() == [0.3, 0.6], "predict changes t in place.")
    kept = all(torch.equal(cond.tensors[name], tensor) for name, tensor in probe.cond.tensors.items())
    need(kept, "predict changes the condition in place.")


def rows_are_independent(probe: Probe) -> None:
    """A sample's prediction does not depend on the batch it is in."""
    need(probe.same(probe.predict(0.5)[:1], probe.predict(0.5, rows=slice(1))), "a row depends on the others.")


def each_row_has_its_time(probe: Probe) -> None:
    """Every sample is predicted at its own t."""
    both = probe.predict(0.25, 0.75)
    for t, rows in ((0.25, slice(0, 1)), (0.75, slice(1, 2))):
        need(probe.same(both[rows], probe.predict(t, rows=rows)), "a row is not predicted at its own t.")


def condition_moves_the_prediction(probe: Probe) -> None:
    """The samples are predicted otherwise under each other's conditions, where there are several."""
    spec = probe.teacher.spec
    if spec.conditioning == "none" or spec.num_classes == 1:
        return
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        swapped = probe.teacher.predict(probe.teacher.net, probe.x_t, t, probe.cond.rows(torch.tensor([1, 0])))
    need(not torch.equal(swapped, probe.predict(0.5)), "the prediction does not depend on the condition.")


def time_is_continuous(probe: Probe) -> None:
    """A quarter of a table's step changes the prediction: t is neither truncated nor rounded."""
    schedule = probe.teacher.spec.schedule
    n = schedule.num_timesteps if isinstance(schedule, DiscreteVP) else 1000
    quarters = [probe.predict((n // 2 + i / 4) / n) for i in range(5)]
    stuck = any(torch.equal(a, b) for a, b in pairwise(quarters))
    need(not (stuck and probe.depends_on_time), f"t is truncated or rounded between {n // 2}/{n} and the next step.")


def predict_uses_the_given_net(probe: Probe) -> None:
    """A deep copy predicts the same, and gradients reach it and not the teacher."""
    teacher, net = probe.teacher, copy.deepcopy(probe.teacher.net)
    need(probe.same(probe.predict(0.5), probe.predict(0.5, net=net)), "a copy of net predicts something else.")
    net.requires_grad_(True)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    prediction = teacher.predict(net, probe.x_t, t, probe.cond)
    need(prediction.requires_grad, "predict gives no gradient to the parameters of the given net.")
    gradients = torch.autograd.grad(prediction.square().mean(), list(net.parameters()), allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    need(used, "predict does not use the given net.")
    need(finite(*used) and any(bool(g.any()) for g in used), "the gradient is zero or not finite.")


def x0_is_finite(probe: Probe) -> None:
    """Converted to x_0 at moderate noise, the prediction is finite."""
    x_0 = TeacherView(probe.teacher).x0(probe.x_t, torch.full((2,), 0.5, dtype=torch.float64), probe.cond)
    need(x_0.shape == probe.x_t.shape and finite(x_0), "the teacher's x_0 at t = 0.5 is not finite.")


def embedding_site_moves_the_prediction(probe: Probe) -> None:
    """The site's output is (b, width); adding 0 to it changes nothing and adding anything else does."""
    site, width = probe.teacher.embedding_site(probe.teacher.net)
    need(any(site is module for module in probe.teacher.net.modules()), "embedding_site is no module of the given net.")
    shapes = []

    def predict_with(offset: Tensor) -> Tensor:
        def add(module: object, args: object, output: Tensor) -> Tensor:
            shapes.append(tuple(output.shape))
            return output + offset.to(output)

        handle = site.register_forward_hook(add)
        try:
            return probe.predict(0.5)
        finally:
            handle.remove()

    unmoved = predict_with(torch.zeros(2, width))
    need(shapes and set(shapes) == {(2, width)}, f"embedding_site gives {shapes}, not (2, {width}).")
    need(torch.equal(unmoved, probe.predict(0.5)), "adding zero at embedding_site changes the prediction.")
    moved = predict_with(torch.randn(2, width, generator=torch.Generator().manual_seed(1)))
    need(not torch.equal(moved, unmoved), "adding to embedding_site does not change the prediction.")


def output_layer_is_last(probe: Probe) -> None:
    """The output layer has a weight and a bias, and nothing of the network goes past it."""
    net = copy.deepcopy(probe.teacher.net)
    layer = probe.teacher.output_layer(net)
    need(any(layer is module for module in net.modules()), "output_layer is no module of the given net.")
    named = dict(layer.named_parameters(recurse=False))
    need({"weight", "bias"} <= named.keys(), "the output layer lacks a weight or a bias.")
    silence = {name: torch.zeros_like(parameter) for name, parameter in layer.state_dict().items()}
    layer.load_state_dict(silence)
    silent = probe.predict(0.5, net=net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)  # the layer's own stay 0
    need(torch.equal(silent, probe.predict(0.5, net=net)), "other layers still speak when output_layer is zero.")


def feature_layers_give_maps(probe: Probe) -> None:
    """The feature layers are modules of the given net, run once and in their order, and give maps (b, c, h, w)."""
    net = copy.deepcopy(probe.teacher.net)
    layers = list(probe.teacher.feature_layers(net))
    modules = list(net.modules())
    need(all(any(layer is module for module in modules) for layer in layers), "a feature layer is no module of net.")
    seen: list[tuple[int, Any]] = []
    for place, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, place=place: seen.append((place, output)))
    probe.predict(0.5, net=net)
    order = [place for place, _ in seen]
    need(order == list(range(len(layers))), f"the feature layers run in the order {order}.")
    for _, output in seen:
        fits = isinstance(output, torch.Tensor) and output.ndim == 4 and len(output) == 2
        need(fits and output.is_floating_point(), "a feature layer does not give maps (b, channels, height, width).")


def guidance_input_starts_neutral(probe: Probe) -> None:
    """An input for the guidance scale changes no prediction at first, can be learned, and is the given net's alone; or
    the teacher says with UsageError that there is no place for one."""
    teacher, net = probe.teacher, copy.deepcopy(probe.teacher.net)
    try:
        teacher.add_guidance_input(net, (1.0, 8.0))
    except UsageError:
        return
    before, t = probe.predict(0.5), torch.full((2,), 0.5, dtype=torch.float64)
    cond = dataclasses.replace(probe.cond, guidance=torch.tensor([1.0, 7.5], device=probe.device))
    own = {name for name, _ in teacher.net.named_parameters()}
    added = [p.requires_grad_() for name, p in net.named_parameters() if name not in own]
    need(added, "the guidance input has no parameters.")
    output = teacher.predict(net, probe.x_t, t, cond)
    need(probe.same(output.detach(), before), "the guidance input changes the prediction before it is trained.")
    gradients = torch.autograd.grad(output.float().square().mean(), added, allow_unused=True)
    need(any(g is not None and bool(g.any()) for g in gradients), "the guidance input gets no gradient.")
    need(torch.equal(probe.predict(0.5), before), "the guidance input changes the teacher's own network.")


def gradient_checkpointing_is_neutral(probe: Probe) -> None:
    """Gradient checkpointing leaves the prediction as it is, or the teacher says with BootError that it has none."""
    net = copy.deepcopy(probe.teacher.net)
    try:
        probe.teacher.enable_gradient_checkpointing(net)
    except BootError:
        return
    need(probe.same(probe.predict(0.5, net=net), probe.predict(0.5)), "gradient checkpointing changes the prediction.")
    calls = []

    def function(block: Any, *inputs: Any) -> Any:
        calls.append(block)
        return block(*inputs)

    probe.teacher.enable_gradient_checkpointing(net, function)
    probe.predict(0.5, net=net)
    need(not calls, "gradient checkpointing works where there are no gradients.")
    net.requires_grad_(True)
    probe.teacher.predict(net, probe.x_t, torch.full((2,), 0.5, dtype=torch.float64), probe.cond)
    need(calls, "gradient checkpointing does not call the function that it is given.")


NETWORK_CLAUSES: tuple[Clause, ...] = (
    net_is_ready,
    prediction_has_shape_of_sample,
    predict_is_deterministic,
    inputs_are_left_alone,
    rows_are_independent,
    each_row_has_its_time,
    condition_moves_the_prediction,
    time_is_continuous,
    predict_uses_the_given_net,
    x0_is_finite,
    embedding_site_moves_the_prediction,
    output_layer_is_last,
    feature_layers_give_maps,
    guidance_input_starts_neutral,
    gradient_checkpointing_is_neutral,
)
