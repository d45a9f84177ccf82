"""Guidance from the settings to the samples: the teacher's, and that of a student which takes w."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from bootcli.closed_form import GaussianMixtureTeacher, GaussianTeacher
from bootcli.config import (
    CorrectionConfig,
    DistillConfig,
    GuidanceConfig,
    KDConfig,
    OptimizerConfig,
    ReplayConfig,
    StudentConfig,
    resolve,
)
from bootcli.critic import Critic
from bootcli.deck import Deck
from bootcli.engine import Engine
from bootcli.errors import UsageError
from bootcli.maths.schedule import Schedule, VarianceExploding, vp_table
from bootcli.memory import need_of, switches
from bootcli.objectives.base import conditions
from bootcli.objectives.corrector import Corrector
from bootcli.objectives.kd import KD
from bootcli.pipelines.defaults import without_auto
from bootcli.pipelines.guidance import teacher_view
from bootcli.pipelines.requests import condition_of, sampling_scale
from bootcli.pipelines.setup import set_up
from bootcli.sampler import prior_noise, reference_calls, teacher_endpoint, teacher_images
from bootcli.student import Student
from bootcli.teachers.guided_pool import LEVELS, GuidedPool
from bootcli.teachers.protocol import Cond
from bootcli.teachers.view import TeacherView
from bootcli.trainer import Trainer
from tests.guided import GuidedTeacher

MEAN = torch.tensor([0.5, -0.3, 0.2, 0.1]).reshape(1, 2, 2)
DDPM = vp_table(torch.linspace(1e-4, 0.02, 1000))
SD = vp_table(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square())
CPU = Engine("cpu", "no")
W = torch.tensor([1.0, 2.0, 3.5, 6.0])


def view(**settings: Any) -> TeacherView:
    teacher = GuidedTeacher(MEAN, 0.4, DDPM, "eps")
    return TeacherView(teacher, 3.0, teacher.condition([None]), **settings)


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(n, 1, 2, 2, generator=generator), torch.linspace(0.2, 0.9, n, dtype=torch.float64)
    return x, t, Cond({"label": torch.zeros(n, dtype=torch.long)})


def test_a_guided_gaussian_has_a_mean_of_w_times_its_own() -> None:
    x, t, cond = inputs()
    found = view().x0(x, t, dataclasses.replace(cond, guidance=W))
    for i, w in enumerate(W):
        exact = GaussianTeacher(w * MEAN, 0.4, DDPM).denoise(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        view().x0(x, t, cond), view().x0(x, t, dataclasses.replace(cond, guidance=torch.full((4,), 3.0)))
    )


@pytest.mark.parametrize("settings", [{}, {"rescale": 0.7}, {"interval": (0.3, 0.6)}])
def test_two_calls_or_one(settings: dict[str, Any]) -> None:
    x, t, cond = inputs()
    together, apart = (view(**settings, one_batch=both).x0(x, t, cond) for both in (True, False))
    torch.testing.assert_close(together, apart)
    assert not torch.equal(together, view().x0(x, t, cond)) or not settings, "the setting has an effect"


def test_two_calls_are_half_as_wide() -> None:
    sizes = []
    one = view(one_batch=False)
    one.teacher.net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    one.x0(*inputs())
    assert sizes == [4, 4]


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_calls_are_counted_as_they_are_made(interval: tuple[float, float], sampler: Literal["ddim", "heun"]) -> None:
    """A guided estimate is two calls, and only those within the interval are guided."""
    guided = view(interval=interval, one_batch=False)
    guided.teacher.spec = dataclasses.replace(guided.teacher.spec, sampler=sampler)
    made = []
    guided.teacher.net.register_forward_pre_hook(lambda module, args: made.append(args))
    list(teacher_images(guided, 10, lambda rows: guided.teacher.condition([0] * len(rows)), range(4), 4, CPU))
    assert len(made) == reference_calls(guided, 10)
    assert reference_calls(guided, 10) < (40 if sampler == "heun" else 21)


@pytest.mark.parametrize(("interval", "rows"), [((0.8, 1.0), 4), ((0.0, 1.0), 8)])
def test_nothing_is_computed_without_a_condition_where_nothing_is_guided(
    interval: tuple[float, float], rows: int
) -> None:
    sizes = []
    guided = view(interval=interval)
    guided.teacher.net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x, t, cond = inputs()
    guided.x0(x, torch.full_like(t, 0.5), cond)
    assert sizes == [rows]


def test_the_corrector_is_guided_at_the_levels_of_both() -> None:
    narrowed = view(interval=(0.2, 0.9), rescale=0.5, one_batch=False).within((0.0, 0.7))
    assert narrowed.interval == (0.2, 0.7)
    assert (narrowed.rescale, narrowed.one_batch, narrowed.guidance_scale) == (0.5, False, 3.0)
    assert Corrector(CorrectionConfig(), view(interval=(0.2, 1.0)), 0.0, 1.0).teacher.interval == (0.2, 0.7)
    x, t, cond = inputs()
    never = view(interval=(0.8, 1.0)).within((0.0, 0.7)).x0(x, t, cond)
    torch.testing.assert_close(never, TeacherView(view().teacher).x0(x, t, cond))


def test_conditions_carry_their_w() -> None:
    _, _, cond = inputs()
    guided = dataclasses.replace(cond, guidance=W)
    rows = guided.rows(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert rows.guidance is not None
    assert rows.guidance.tolist() == [3.5, 1.0]
    both = rows.then(guided).guidance
    assert both is not None
    assert both.tolist() == [3.5, 1.0, *W.tolist()]
    assert rows.then(cond).guidance is None


def test_a_number_of_a_guided_pool_is_a_condition_and_a_w() -> None:
    pool = GuidedPool(Cond({"label": torch.arange(3)}), 2.0, 8.0)
    rows = pool.rows(torch.tensor([0, 2 * LEVELS - 1, 2 * LEVELS + LEVELS // 2]))
    assert len(pool) == 3
    assert rows.tensors["label"].tolist() == [0, 1, 2]
    assert rows.guidance is not None
    assert rows.guidance.tolist() == pytest.approx([2.0, 8.0, 5.0], abs=1e-5)


def test_w_is_drawn_uniformly_and_changes_no_draw_without_it() -> None:
    plain, again = (conditions(torch.Generator().manual_seed(0), 4000, 3) for _ in range(2))
    drawn = conditions(torch.Generator().manual_seed(0), 4000, 3, LEVELS)
    assert torch.equal(plain, again)
    assert torch.equal(drawn // LEVELS, plain)
    share = (drawn % LEVELS).double() / LEVELS
    assert abs(share.mean() - 1 / 2) < 0.02
    assert abs(share.var() - 1 / 12) < 0.005


def test_a_stored_path_keeps_its_w() -> None:
    guided = view(levels=LEVELS)
    pool = GuidedPool(Cond({"label": torch.zeros(1, dtype=torch.long)}), 1.0, 6.0)
    kd = KD(KDConfig(teacher_steps=50, solver="heun", buffer=64), 0.0, guided, 0.0, 0.9, pool)
    kd.renew(torch.Generator().manual_seed(0), 64, 1, 1, CPU)
    other = KD(KDConfig(solver="heun", buffer=64), 0.0, guided, 0.0, 0.9, pool)
    other.load_state(kd.state())
    draw = other.draw(torch.Generator().manual_seed(1), 16, 1, 0.0)
    w = pool.rows(draw.rows).guidance
    assert w is not None
    assert w.max() - w.min() > 3
    for eps, scale, point in zip(draw.eps, w, draw.points, strict=True):
        end = GaussianTeacher(scale * MEAN, 0.4, DDPM).exact_signal(eps[None], torch.zeros(1).double(), 0.9)[0]
        torch.testing.assert_close(point.double(), end, rtol=0, atol=0.02)


RANGE = (1.0, 5.0)
CONFIG = DistillConfig(
    objective="kd",
    guidance_range=RANGE,
    classes=(0,),
    steps=300,
    batch_size=64,
    learning_rate=0.02,
    optimizer=OptimizerConfig(name="adamw", warmup_steps=20),
    kd=KDConfig(teacher_steps=8, power=0.0),
)


def test_a_student_begins_as_the_teachers_boundary_at_every_w() -> None:
    teacher = GuidedTeacher(MEAN, 0.4)
    eps, one = prior_noise(range(4), (1, 2, 2)), torch.ones(4, dtype=torch.float64)
    student, plain = Student(teacher, "native", 0.0, guidance_range=RANGE), Student(teacher, "native", 0.0)
    _, _, cond = inputs()
    sample = student.sample(eps, dataclasses.replace(cond, guidance=W))
    assert torch.equal(sample, plain.sample(eps, cond))
    torch.testing.assert_close(sample, TeacherView(teacher).x0(eps, one, cond))


@pytest.mark.parametrize("corrector", [False, True])
def test_the_student_follows_w(corrector: bool) -> None:
    """At the ends of the range it is near the teacher's guided end of that w, and far from the other's."""
    teacher = GuidedTeacher(MEAN, 0.4)
    config = dataclasses.replace(CONFIG, corrector=corrector, steps=150 if corrector else 300)
    work = set_up(teacher, config, CPU)
    trainer = Trainer(work, work.config, CPU)
    for report in trainer.run():
        assert report.images in (64, 48)
    eps = prior_noise(range(64), (1, 2, 2))
    at = {w: condition_of(teacher, config, guidance_scale=w)(range(64)) for w in RANGE}
    ends = {w: teacher_endpoint(work.view, eps, cond, work.t_max, 50) for w, cond in at.items()}
    samples = {w: work.student.sample(eps, cond).detach() for w, cond in at.items()}
    errors = {(a, b): float((samples[a] - ends[b]).square().mean()) for a in RANGE for b in RANGE}
    low, high = RANGE
    assert max(errors[low, low], errors[high, high]) < 0.1 * min(errors[low, high], errors[high, low]), errors


def test_the_critic_is_told_w() -> None:
    teacher = GuidedTeacher(MEAN, 0.4)
    critic = Critic(teacher, CorrectionConfig(), RANGE)
    assert "guidance" in dict(critic.net.named_parameters())
    assert "guidance" not in dict(teacher.net.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": StudentConfig(lora_rank=4)}, "--lora-rank: a LoRA shares the teacher's network"),
        ({"corrector": True, "correction": CorrectionConfig(critic="lora")}, "critic = lora shares"),
    ],
)
def test_a_lora_cannot_take_w(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(GuidedTeacher(MEAN, 0.4), dataclasses.replace(CONFIG, **settings), CPU)


@pytest.mark.parametrize("corrector", [False, True])
def test_memory_counts_the_input_for_w(corrector: bool) -> None:
    config = dataclasses.replace(CONFIG, corrector=corrector)
    work = set_up(GuidedTeacher(MEAN, 0.4), config, CPU)
    cuda = torch.device("cuda")
    need = need_of(work.view.teacher, work.config, cuda)
    assert need.student == 4 * sum(p.numel() for p in work.student.parameters())
    assert need.companions == (0 if work.critic is None else 4 * sum(p.numel() for p in work.critic.parameters()))
    named = [each.setting for each in switches(work.view.teacher, work.config, cuda, None, None)]
    assert "--set guidance.one_batch=false" in named
    assert not any("lora" in name for name in named)


def test_prompts_in_shuffled_epochs_each_have_a_w() -> None:
    deck = Deck(3, lambda epoch: torch.Generator().manual_seed(epoch))
    drawn = conditions(torch.Generator().manual_seed(0), 6, deck, LEVELS)
    deck.drawn = 0
    assert torch.equal(drawn // LEVELS, deck.take(6))
    assert len(set((drawn % LEVELS).tolist())) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_range": (8, 2)}, r"guidance_range = \[8, 2\] does not rise"),
        ({"guidance_range": (-1, 2)}, "guidance_range"),
        ({"guidance_range": (2, float("inf"))}, "guidance_range"),
        ({"guidance_range": (2, 8), "guidance_scale": 3.0}, "--guidance-range many"),
        ({"guidance.interval": (0.5, 0.2)}, r"guidance\.interval = \[0\.5, 0\.2\] does not rise"),
        ({"correction.guidance_interval": (0.7, 0.0)}, r"correction\.guidance_interval = \[0\.7, 0\] does not rise"),
        ({"guidance.rescale": 1.5}, "rescale"),
    ],
)
def test_settings_that_say_nothing(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance.rescale", 0.7),
        ("guidance.interval", (0.2, 0.8)),
        ("guidance.one_batch", False),
        ("correction.guidance_interval", (0.0, 1.0)),
    ],
)
def test_settings_without_an_effect(name: str, value: object) -> None:
    config = resolve({name: value})
    with pytest.raises(UsageError, match=rf"^{name}: this run is not guided"):
        teacher_view(GuidedTeacher(MEAN, 0.4), config, CPU)
    teacher_view(GuidedTeacher(MEAN, 0.4), dataclasses.replace(config, guidance_scale=3.0), CPU)


def test_the_view_has_all_settings() -> None:
    guidance = GuidanceConfig(rescale=0.7, interval=(0.2, 0.8), one_batch=False)
    found = teacher_view(GuidedTeacher(MEAN, 0.4), DistillConfig(guidance_range=(1, 3), guidance=guidance), CPU)
    assert (found.rescale, found.interval, found.one_batch) == (0.7, (0.2, 0.8), False)
    assert (found.guidance_scale, found.levels) == (2.0, LEVELS)
    assert reference_calls(found, 10) == 10 + 7, "guided at the seven levels within the interval"
    baked = teacher_view(GuidedTeacher(MEAN, 0.4), DistillConfig(guidance_scale=3.0), CPU)
    assert (baked.guidance_scale, baked.levels, baked.rescale) == (3.0, 1, 0.0)


def test_paths_of_a_guided_teacher_are_drawn_without_a_corrector() -> None:
    teacher = GuidedTeacher(MEAN, 0.4)
    for config, solver in ((DistillConfig(), "unipc"), (DistillConfig(guidance_scale=3.0), "multistep")):
        found = without_auto(teacher, config, CPU)
        assert (found.kd.solver, found.replay.solver) == (solver, solver)
    named = DistillConfig(kd=KDConfig(solver="euler"))
    assert without_auto(teacher, named, CPU).kd.solver == "euler"


@pytest.mark.parametrize(
    ("schedule", "said", "start"),
    [
        (SD, {"guidance_scale": 3.0}, "noise"),
        (SD, {"guidance_range": (1.0, 3.0)}, "noise"),
        (SD, {}, "estimate"),
        (SD, {"guidance_scale": 3.0, "student.path_start": "estimate"}, "estimate"),
        (SD, {"guidance_scale": 3.0, "student.max_gain": 5.0}, "estimate"),
        (DDPM, {"guidance_scale": 3.0}, "estimate"),  # they begin below t = 1
        (VarianceExploding(), {"guidance_scale": 3.0}, "estimate"),
        (VarianceExploding(), {"guidance_scale": 3.0, "student.max_gain": 100.0}, "noise"),
    ],
)
def test_guided_paths_begin_with_noise_where_they_begin_at_all_of_it(
    schedule: Schedule, said: dict[str, object], start: str
) -> None:
    config = resolve(said)
    teacher = GuidedTeacher(MEAN, 0.4, schedule, "eps")
    assert without_auto(teacher, config, CPU).student.path_start == start
    assert teacher_view(teacher, config, CPU).path_start == start


def test_stored_paths_take_at_most_so_much() -> None:
    teacher = GuidedTeacher(MEAN, 0.4)
    assert without_auto(teacher, DistillConfig(), CPU).kd.buffer == 16_384
    large = GuidedTeacher(torch.zeros(3, 256, 256), 0.4)
    found = without_auto(large, DistillConfig(replay=ReplayConfig(buffer=7)), CPU)
    assert 2**32 - 2**21 < (found.kd.buffer or 0) * 2 * 4 * 3 * 256**2 < 2**32
    assert found.replay.buffer == 7


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_view_begins_paths_as_the_student_does(scale: float) -> None:
    for start in ("estimate", "noise"):
        config = DistillConfig(guidance_scale=scale, student=StudentConfig(path_start=start))  # type: ignore[arg-type]
        assert teacher_view(GuidedTeacher(MEAN, 0.4), config, CPU).path_start == start


def test_w_of_samples() -> None:
    takes = DistillConfig(guidance_range=(0.0, 8.0))
    assert [sampling_scale(takes, wanted) for wanted in (None, 0.0, 8.0)] == [4.0, 0.0, 8.0]
    with pytest.raises(UsageError, match="from 0 to 8"):
        sampling_scale(takes, 8.1)
    baked = DistillConfig(guidance_scale=3.0)
    assert sampling_scale(baked, None) is None
    with pytest.raises(UsageError, match="w = 3 is part of this student"):
        sampling_scale(baked, 3.0)
    none = teacher_view(GuidedTeacher(MEAN, 0.4), takes, CPU, guidance_scale=0.0)
    x, t, cond = inputs()
    torch.testing.assert_close(
        none.x0(x, t, cond), TeacherView(none.teacher).x0(x, t, none.teacher.condition([None] * 4))
    )


def test_a_family_without_a_place_for_w_says_so() -> None:
    teacher = GaussianMixtureTeacher(MEAN[None], torch.ones(1), torch.ones(1), conditioning="class")
    with pytest.raises(UsageError, match="have no input for a guidance scale"):
        set_up(teacher, DistillConfig(guidance_range=(2, 8)), CPU)
    with pytest.raises(UsageError, match="--guidance-range: the teacher fashion is unconditional"):
        set_up(GaussianTeacher(MEAN, 0.4), DistillConfig(guidance_range=(2, 8)), CPU)
