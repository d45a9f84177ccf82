"""The conformance kit: sound teachers pass, and every clause catches a teacher that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher, MixtureNet, build
from bootcli.errors import BootError
from bootcli.maths.prediction import PredictionType
from bootcli.maths.schedule import Coefficients, CosineVP, LinearPath, Schedule, VarianceExploding, vp_table
from bootcli.plugin import Cond, Exporter, FeatureSpace, Teacher, TeacherFamily, check_teacher
from bootcli.testing import DESCRIPTION_CLAUSES, FAMILY_CLAUSES, SPEC_CLAUSES, ConformanceError
from bootcli.testing_network import NETWORK_CLAUSES
from tests.guided import GuidedTeacher

CLAUSES = [*SPEC_CLAUSES, *NETWORK_CLAUSES, *DESCRIPTION_CLAUSES, *FAMILY_CLAUSES]
MEAN = torch.full((1, 4, 4), 0.5)
DDPM = vp_table(torch.linspace(1e-4, 0.02, 1000))


def family(**changes: Any) -> TeacherFamily:
    def load(path: Path) -> Teacher:
        raise BootError(f"{path} holds no closed form.")

    plain = TeacherFamily("closed-form", "Mixtures of Gaussians.", ("nothing",), lambda path: False, load, build)
    return replace(plain, **changes)


def mixture(cls: type[GaussianMixtureTeacher] = GaussianMixtureTeacher, **changes: Any) -> GaussianMixtureTeacher:
    means = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"schedule": DDPM, "prediction": "eps"}
    return cls(means, torch.tensor([0.3, 0.5, 0.0]), torch.ones(3), **(settings | changes))


SOUND = [
    (schedule, prediction)
    for schedule in (LinearPath(), CosineVP(), DDPM, VarianceExploding())
    for prediction in get_args(PredictionType)
    if prediction != "eps" or schedule.time_of(1e8) == 1  # eps says nothing where alpha(1) = 0
]


@pytest.mark.parametrize(("schedule", "prediction"), SOUND, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_closed_forms_pass(schedule: Schedule, prediction: PredictionType) -> None:
    gaussian = GaussianTeacher(torch.full((3, 2, 2), 0.5), 0.5, schedule, prediction)
    assert check_teacher(gaussian, family()) == [clause.__name__ for clause in CLAUSES]
    conditional = mixture(schedule=schedule, prediction=prediction, conditioning="class")
    assert check_teacher(conditional, family()) == [clause.__name__ for clause in CLAUSES]


def test_a_guidance_input_passes() -> None:
    assert check_teacher(GuidedTeacher(MEAN, 0.5), family()) == [clause.__name__ for clause in CLAUSES]


def test_family_is_optional() -> None:
    assert check_teacher(mixture()) == [clause.__name__ for clause in CLAUSES if clause not in FAMILY_CLAUSES]


def test_failure_is_an_assertion_with_a_sentence() -> None:
    with pytest.raises(AssertionError, match=r"^net_is_ready: module 'net' is in training mode\.$"):
        check_teacher(edited(lambda teacher: teacher.net.train()))


def edited(edit: Callable[[GaussianMixtureTeacher], object]) -> GaussianMixtureTeacher:
    teacher = mixture()
    edit(teacher)
    return teacher


def respec(**changes: Any) -> GaussianMixtureTeacher:
    def edit(teacher: GaussianMixtureTeacher) -> None:
        teacher.spec = replace(teacher.spec, **changes)

    return edited(edit)


def answering(method: str, answer: object) -> GaussianMixtureTeacher:
    """A teacher whose ``method`` gives ``answer`` whatever it is asked."""
    return edited(lambda teacher: setattr(teacher, method, lambda *args: answer))


Predict = Callable[[Teacher, nn.Module, Tensor, Tensor, Cond], Tensor]


def predicting(wrong: Predict, **changes: Any) -> GaussianMixtureTeacher:
    class Wrong(GaussianMixtureTeacher):
        def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return wrong(super(), net, x_t, t, cond)  # type: ignore[arg-type]

    return mixture(Wrong, **changes)


def changed(at: Callable[[Tensor], Tensor] = lambda t: t, x: Callable[[Tensor], Tensor] = lambda x_t: x_t) -> Predict:
    return lambda right, net, x_t, t, cond: right.predict(net, x(x_t), at(t), cond)


def result(change: Callable[[Tensor, Tensor], Tensor]) -> Predict:
    """``change`` sees the prediction and t."""
    return lambda right, net, x_t, t, cond: change(right.predict(net, x_t, t, cond), t)


def own_net(right: Teacher, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return right.predict(KEPT.net, x_t, t, cond)


@torch.no_grad()
def without_gradient(right: Teacher, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return right.predict(net, x_t, t, cond)


def spoil_label(right: Teacher, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    prediction = right.predict(net, x_t, t, cond)
    cond.tensors["label"].fill_(-1)
    return prediction


def one_label(right: Teacher, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return right.predict(net, x_t, t, Cond({"label": torch.zeros_like(cond.tensors["label"])}))


KEPT = mixture()


@dataclass(frozen=True)
class Backwards(Schedule):
    """t = 0 is noise, as in many flow-matching codes."""

    def __call__(self, t: Tensor) -> Coefficients:
        return Coefficients(t.double(), 1 - t.double())


@dataclass(frozen=True)
class Single(Schedule):
    """Coefficients in single precision."""

    def __call__(self, t: Tensor) -> Coefficients:
        return Coefficients(1 - t.float(), t.float())


class Patchwork(GaussianMixtureTeacher):
    """A network with a layer that nothing uses and one after its last."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        right = self.net

        class Net(MixtureNet):
            def forward(self, x_t: Tensor, coefficients: Tensor, label: Tensor | None = None) -> Tensor:
                self.unused(coefficients)
                return self.gain * super().forward(x_t, coefficients, label) + self.gain

        net = Net(torch.zeros(3, 1, 4, 4), torch.ones(3), torch.ones(3), self.spec.prediction)
        net.load_state_dict(right.state_dict())
        net.gain, net.unused = nn.Parameter(torch.ones(())), nn.Identity()
        self.net = net.eval()


class Twice(GaussianMixtureTeacher):
    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return (super().predict(net, x_t, t, cond) + super().predict(net, x_t, t, cond)) / 2

    def feature_layers(self, net: nn.Module) -> Sequence[nn.Module]:
        return [net.get_submodule("output")]


class AnyClass(GaussianMixtureTeacher):
    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        return Cond({"label": torch.tensor([r if isinstance(r, int) else 0 for r in requests])})


class OneRow(GaussianMixtureTeacher):
    def condition(self, requests: Sequence[int | str | None]) -> Cond:
        return super().condition(requests[:1])


class Confusion(GaussianMixtureTeacher):
    def enable_gradient_checkpointing(self, net: nn.Module) -> None:
        net.get_parameter("means").data.add_(1)


class Forgetful(GaussianMixtureTeacher):
    """Its images are half as bright once it was released."""

    brightness = 1.0

    def release(self) -> None:
        self.brightness = 0.5

    def decode(self, z: Tensor) -> Tensor:
        return self.brightness * z


class Loud(GuidedTeacher):
    def add_guidance_input(self, net: nn.Module, guidance_range: tuple[float, float]) -> None:
        super().add_guidance_input(net, guidance_range)
        net.get_parameter("guidance").data.add_(1)


class Heedless(GuidedTeacher):
    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return super().predict(net, x_t, t, replace(cond, guidance=None))


class Shared(GuidedTeacher):
    def add_guidance_input(self, net: nn.Module, guidance_range: tuple[float, float]) -> None:
        super().add_guidance_input(net, guidance_range)
        self.net.get_parameter("means").data.add_(1)


class Deaf(GaussianMixtureTeacher):
    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        pass


class Eager(GaussianMixtureTeacher):
    def enable_gradient_checkpointing(self, net: nn.Module, function: Callable[..., Any] | None = None) -> None:
        if function is not None:
            net.register_forward_pre_hook(lambda module, args: function(lambda: None))


class Unjson(GaussianMixtureTeacher):
    def config(self) -> dict[str, object]:
        return super().config() | {"prediction": {self.spec.prediction}}


def features(**changes: Any) -> FeatureSpace:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    plain = FeatureSpace("digits-cnn", network, torch.zeros(5).double(), torch.eye(5).double(), 100, "digits")
    return replace(plain, **changes)


def exporting(exporter: Exporter) -> GaussianMixtureTeacher:
    return answering("export_formats", {"onnx": exporter})


def poisoned(teacher: GaussianMixtureTeacher) -> None:
    teacher.net.get_parameter("means").data[0, 0, 0, 0] = torch.nan


def no_bias(teacher: GaussianMixtureTeacher) -> None:
    teacher.net.get_submodule("output").bias = None


def site(name: str, width: int) -> GaussianMixtureTeacher:
    teacher = mixture(Patchwork)
    teacher.embedding_site = lambda net: (net.get_submodule(name), width)  # type: ignore[method-assign]
    return teacher


def layers(*names: str) -> GaussianMixtureTeacher:
    teacher = mixture()
    teacher.feature_layers = lambda net: [net.get_submodule(name) for name in names]  # type: ignore[method-assign]
    return teacher


def built_with(**changes: object) -> TeacherFamily:
    return family(build=lambda config: build({**config, **changes}))


def reading_a_weight(config: Mapping[str, Any]) -> Teacher:
    teacher = build(config)
    assert next(teacher.net.parameters()).sum().item() < 1e9
    return teacher


def raising(path: Path) -> bool:
    return bool(path.read_bytes())


@dataclass(frozen=True)
class Case:
    clause: str
    make: Callable[[], Teacher]
    family: TeacherFamily = field(default_factory=family)


def nan_at_1(prediction: Tensor, t: Tensor) -> Tensor:
    return prediction.masked_fill((t == 1).reshape(-1, 1, 1, 1), torch.nan)


CASES: Mapping[str, Case] = {
    "empty image": Case("spec_is_sane", lambda: respec(sample_shape=(1, 0, 4))),
    "two-dimensional": Case("spec_is_sane", lambda: respec(sample_shape=(4, 4))),
    "unknown prediction": Case("spec_is_sane", lambda: respec(prediction="noise")),
    "unknown conditioning": Case("spec_is_sane", lambda: respec(conditioning="audio")),
    "classes without class": Case("spec_is_sane", lambda: respec(num_classes=10)),
    "class without classes": Case("spec_is_sane", lambda: respec(conditioning="class")),
    "unknown sampler": Case("spec_is_sane", lambda: respec(sampler="ancestral")),
    "unknown head": Case("spec_is_sane", lambda: answering("head", "raw")),
    "eps of pure noise": Case("schedule_runs_from_data_to_noise", lambda: respec(schedule=LinearPath())),
    "time runs backwards": Case(
        "schedule_runs_from_data_to_noise", lambda: respec(schedule=Backwards(), prediction="v")
    ),
    "float32 schedule": Case("schedule_runs_from_data_to_noise", lambda: respec(schedule=Single(), prediction="v")),
    "training mode": Case("net_is_ready", lambda: edited(lambda teacher: teacher.net.embedding.train())),
    "NaN weight": Case("net_is_ready", lambda: edited(poisoned)),
    "cropped": Case("prediction_has_shape_of_sample", lambda: predicting(result(lambda p, t: p[..., 1:]))),
    "integers": Case("prediction_has_shape_of_sample", lambda: predicting(result(lambda p, t: p.long()))),
    "NaN at t = 1": Case("prediction_has_shape_of_sample", lambda: predicting(result(nan_at_1))),
    "random": Case("predict_is_deterministic", lambda: predicting(result(lambda p, t: p + torch.randn_like(p)))),
    "x in place": Case("inputs_are_left_alone", lambda: predicting(changed(x=lambda x: x.mul_(0.5)))),
    "t in place": Case("inputs_are_left_alone", lambda: predicting(changed(at=lambda t: t.mul_(0.5)))),
    "label in place": Case("inputs_are_left_alone", lambda: predicting(spoil_label, conditioning="class")),
    "batch norm": Case("rows_are_independent", lambda: predicting(changed(x=lambda x: x - x.mean(0)))),
    "first t for all": Case("each_row_has_its_time", lambda: predicting(changed(at=lambda t: t[:1].expand(len(t))))),
    "mean t for all": Case("each_row_has_its_time", lambda: predicting(changed(at=lambda t: t.mean().expand(len(t))))),
    "unread label": Case("condition_moves_the_prediction", lambda: predicting(one_label, conditioning="class")),
    "truncated t": Case("time_is_continuous", lambda: predicting(changed(at=lambda t: (t * 1000).floor() / 1000))),
    "rounded t": Case("time_is_continuous", lambda: predicting(changed(at=lambda t: (t * 1000).round() / 1000))),
    "another net": Case("predict_uses_the_given_net", lambda: predicting(own_net)),
    "no gradient": Case("predict_uses_the_given_net", lambda: predicting(without_gradient)),
    "broken threshold": Case("x0_is_finite", lambda: respec(threshold=lambda x_0: x_0 / 0)),
    "foreign site": Case("embedding_site_moves_the_prediction", lambda: answering("embedding_site", (nn.ReLU(), 2))),
    "unused site": Case("embedding_site_moves_the_prediction", lambda: site("unused", 2)),
    "wrong width": Case("embedding_site_moves_the_prediction", lambda: site("embedding", 3)),
    "site of another shape": Case("embedding_site_moves_the_prediction", lambda: site("output", 2)),
    "foreign layer": Case("output_layer_is_last", lambda: answering("output_layer", nn.Linear(2, 2))),
    "layer without bias": Case("output_layer_is_last", lambda: edited(no_bias)),
    "layer before the last": Case("output_layer_is_last", lambda: mixture(Patchwork)),
    "foreign feature layer": Case("feature_layers_give_maps", lambda: answering("feature_layers", [nn.ReLU()])),
    "feature layers the wrong way": Case("feature_layers_give_maps", lambda: layers("output", "embedding")),
    "feature layer runs twice": Case("feature_layers_give_maps", lambda: mixture(Twice)),
    "features are vectors": Case("feature_layers_give_maps", lambda: layers("embedding")),
    "guidance changes": Case("guidance_input_starts_neutral", lambda: Loud(MEAN, 0.5)),
    "guidance is not read": Case("guidance_input_starts_neutral", lambda: Heedless(MEAN, 0.5)),
    "guidance changes the teacher": Case("guidance_input_starts_neutral", lambda: Shared(MEAN, 0.5)),
    "checkpointing changes": Case("gradient_checkpointing_is_neutral", lambda: mixture(Confusion)),
    "checkpointing of its own": Case("gradient_checkpointing_is_neutral", lambda: mixture(Deaf)),
    "checkpointing without gradients": Case("gradient_checkpointing_is_neutral", lambda: mixture(Eager)),
    "every class": Case("conditions_are_checked", lambda: mixture(AnyClass, conditioning="class")),
    "text without text": Case("conditions_are_checked", lambda: respec(conditioning="text")),
    "one row": Case("conditions_are_checked", lambda: mixture(OneRow, conditioning="class")),
    "bytes": Case("decode_gives_images", lambda: edited(lambda t: setattr(t, "decode", lambda z: z * 255))),
    "zero to one": Case("decode_gives_images", lambda: edited(lambda t: setattr(t, "decode", lambda z: (z + 1) / 2))),
    "two channels": Case("decode_gives_images", lambda: answering("decode", torch.randn(2, 2, 4, 4))),
    "other images afterwards": Case("what_is_let_go_comes_back", lambda: mixture(Forgetful)),
    "fingerprint is a number": Case("what_is_let_go_comes_back", lambda: answering("fingerprint", 3)),
    "unknown setting": Case("recipe_is_valid", lambda: answering("recipe", {"boot.gamma": 1})),
    "bad setting": Case("recipe_is_valid", lambda: answering("recipe", {"boot.delta": "large"})),
    "no such module": Case("lora_targets_exist", lambda: answering("lora_targets", ("to_q",))),
    "part of a name": Case("lora_targets_exist", lambda: answering("lora_targets", ("put",))),
    "number in describe": Case("description_is_text", lambda: answering("describe", {"parameters": 3})),
    "a function as exporter": Case("exporters_are_complete", lambda: answering("export_formats", {"onnx": print})),
    "no check": Case("exporters_are_complete", lambda: exporting(Exporter(lambda *_: None, Path("missing.py")))),
    "no writer": Case("exporters_are_complete", lambda: exporting(Exporter("write", Path(__file__)))),  # type: ignore[arg-type]
    "features do not fit": Case(
        "feature_space_fits", lambda: answering("feature_space", features(mean=torch.zeros(4).double()))
    ),
    "single statistics": Case("feature_space_fits", lambda: answering("feature_space", features(cov=torch.eye(5)))),
    "reference features do not fit": Case(
        "feature_space_fits", lambda: answering("feature_space", features(features=torch.zeros(9, 4)))
    ),
    "reference features are not finite": Case(
        "feature_space_fits", lambda: answering("feature_space", features(features=torch.full((9, 5), torch.nan)))
    ),
    "called inception": Case("feature_space_fits", lambda: answering("feature_space", features(name="Inception-v3"))),
    "matches everything": Case("family_refuses_junk", mixture, family(matches=lambda path: True)),
    "matches by name": Case("family_refuses_junk", mixture, family(matches=lambda path: path.suffix == ".json")),
    "matches raises": Case("family_refuses_junk", mixture, family(matches=raising)),
    "config is no JSON": Case("build_remakes_the_teacher", lambda: mixture(Unjson)),
    "build forgets the type": Case("build_remakes_the_teacher", mixture, built_with(prediction="v")),
    "build reads a weight": Case("build_remakes_the_teacher", mixture, family(build=reading_a_weight)),
    "build forgets a size": Case("build_remakes_the_teacher", mixture, built_with(components=2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_breach_is_caught(case: Case) -> None:
    with pytest.raises(ConformanceError, match=f"^{case.clause}: ."):
        check_teacher(case.make(), case.family)


def test_every_clause_has_a_breach() -> None:
    assert {case.clause for case in CASES.values()} == {clause.__name__ for clause in CLAUSES}


def test_good_feature_space_passes() -> None:
    check_teacher(answering("feature_space", features()))
    check_teacher(answering("feature_space", features(features=torch.zeros(9, 5).half())))


def test_good_exporter_passes() -> None:
    check_teacher(exporting(Exporter(lambda *_: None, Path(__file__))))
