"""What images are asked for: classes, prompts and guidance scales, in turn by the seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bootcli.config import DistillConfig
from bootcli.errors import UsageError
from bootcli.prompts import Prompt, Prompts, read_prompts
from bootcli.sampler import CondOf, SeedOf
from bootcli.teachers.protocol import Cond, Conditions, Teacher


def sampling_scale(config: DistillConfig, wanted: float | None) -> float | None:
    """w of images that are drawn: what is wanted, else the middle of the range that the student takes w from; None
    where w is built in. Raises `UsageError` for a w that it does not take."""
    limits = config.guidance_range
    if limits is None:
        if wanted is None:
            return None
        raise UsageError(
            f"--guidance-scale: guidance w = {config.guidance_scale:g} is part of this student.",
            "Leave it out, or distil a student that takes w, with: --guidance-range 2,8",
        )
    if wanted is None:
        return sum(limits) / 2
    if not limits[0] <= wanted <= limits[1]:
        raise UsageError(
            f"--guidance-scale {wanted:g}: this student takes a w from {limits[0]:g} to {limits[1]:g}.",
            "Take one of these.",
        )
    return wanted


def class_pool(teacher: Teacher, config: DistillConfig) -> Cond:
    """All conditions that a run distils of a teacher without words."""
    return teacher.condition(_labels(teacher, config)) if teacher.spec.conditioning == "class" else Cond()


def _labels(teacher: Teacher, config: DistillConfig) -> list[int]:
    """The classes that a run distils of a teacher that has some."""
    return list(range(teacher.spec.num_classes) if config.classes is None else config.classes)


def check_requests(teacher: Teacher, config: DistillConfig) -> None:
    """Raise `UsageError` for prompts or classes that the teacher does not take."""
    kind = teacher.spec.conditioning
    if config.prompts is not None and kind != "text":
        raise UsageError(f"--prompts: the teacher {config.teacher} takes no prompts.", "Leave it out.")
    if config.classes is not None and kind != "class":
        raise UsageError(f"--classes: the teacher {config.teacher} has no classes.", "Leave it out.")


def prompts_of(teacher: Teacher, config: DistillConfig, wanted: Prompts | None = None) -> Prompts | None:
    """The prompts that images take in turn: those that are asked for, or the run's; None where there are none.

    Raises `UsageError` where the teacher takes none.
    """
    if teacher.spec.conditioning == "text":
        return read_prompts(config.prompts) if wanted is None else wanted
    if wanted is not None:
        raise UsageError(f"The teacher {config.teacher} takes no prompts.", "Leave them out.")
    return None


def check_negatives(prompts: Prompts, config: DistillConfig) -> None:
    """Raise `UsageError` for negative prompts beside the prompts of a teacher that is not guided."""
    if prompts.own_negatives and not config.guided:
        raise UsageError(
            "--prompts: without guidance nothing leads away from its negative prompts.",
            "Take them out, or distil with: --guidance-scale 7.5",
        )


def condition_of(
    teacher: Teacher,
    config: DistillConfig,
    class_label: int | None = None,
    prompts: Prompts | None = None,
    guidance_scale: float | None = None,
) -> CondOf:
    """The conditions of images by their seeds: the class that is asked for, or all of the run in turn.

    Args:
        teacher: whose.
        config: of the run.
        class_label: of all of them.
        prompts: that they take in turn; None: those of the run.
        guidance_scale: w of all of them, for a student that takes one; None: the middle of its range.

    Raises `UsageError` for a request that the teacher cannot honour, a class that the run left out, or a w that the
    student does not take (`sampling_scale`).
    """
    scale = sampling_scale(config, guidance_scale)
    check_requests(teacher, config)
    kind = teacher.spec.conditioning
    if class_label is not None and kind != "class":
        raise UsageError(f"--class: the teacher {config.teacher} has no classes.", "Leave it out.")
    if class_label is not None and config.classes is not None and class_label not in config.classes:
        raise UsageError(f"--class {class_label} was not distilled.", f"This run has: {list(config.classes)}")
    if (prompts := prompts_of(teacher, config, prompts)) is not None:  # only what is drawn is encoded
        return guided_by(lambda seeds: of_prompts(teacher, config, map(prompts.in_turn, seeds)), scale)
    pool = class_pool(teacher, config) if class_label is None else teacher.condition([class_label])
    return guided_by(in_turn(pool), scale)


def seed_of(prompts: Prompts | None) -> SeedOf:
    """What images are drawn from that take these prompts in turn."""
    return int if prompts is None else prompts.seed_of


def request_of(
    teacher: Teacher, config: DistillConfig, class_label: int | None = None, prompts: Prompts | None = None
) -> Callable[[int], dict[str, str]]:
    """What the image of a seed was asked for, in words; as `condition_of` conditions it. ``prompts``: `prompts_of`."""
    if teacher.spec.conditioning == "class":
        labels = _labels(teacher, config) if class_label is None else [class_label]
        return lambda seed: {"class": str(labels[seed % len(labels)])}
    return lambda seed: {} if prompts is None else {"prompt": prompts.in_turn(seed).text}


def in_turn(pool: Conditions) -> CondOf:
    """The conditions of a pool, one after the other, by the seed."""
    return lambda seeds: pool.rows(torch.tensor(list(seeds)) % len(pool))


def guided_by(cond_of: CondOf, scale: float | None) -> CondOf:
    """The same conditions, each with that w; without one where there is none."""
    if scale is None:
        return cond_of
    return lambda seeds: dataclasses.replace(cond_of(seeds), guidance=torch.full((len(seeds),), scale))


def labels_of(
    teacher: Teacher, config: DistillConfig, words: Sequence[str] = (), prompts: Prompts | None = None
) -> Callable[[Sequence[int]], Tensor]:
    """The class labels of images by their seeds, (b,), as `condition_of` conditions them.

    Args:
        teacher, config: of the run.
        words: what the prompts of a text teacher call the classes; one that names none of them, or two, is no class:
            -1.
        prompts: that images take in turn; None: those of the run.
    """
    if (prompts := prompts_of(teacher, config, prompts)) is not None:
        return lambda seeds: torch.tensor([class_in(prompts.in_turn(seed).text, words) for seed in seeds])
    pool = torch.tensor(_labels(teacher, config))
    return lambda seeds: pool[torch.tensor(list(seeds)) % len(pool)]


def class_in(prompt: str, words: Sequence[str]) -> int:
    """The one class that a prompt names; the longest word wins where one lies within another ("t-shirt")."""
    longest = sorted(words, key=len, reverse=True)
    named = set(re.findall(rf"(?<!\w)({'|'.join(map(re.escape, longest))})(?!\w)", prompt.lower()))
    return words.index(named.pop()) if len(named) == 1 else -1


def of_prompts(teacher: Teacher, config: DistillConfig, requests: Iterable[Prompt]) -> Cond:
    """What prompts condition a text teacher on, with negative ones where any has its own; encoded here and now."""
    prompts = list(requests)
    cond = teacher.condition([prompt.text for prompt in prompts])
    if not config.guided or all(prompt.negative is None for prompt in prompts):
        return cond
    wanted = [config.negative_prompt if prompt.negative is None else prompt.negative for prompt in prompts]
    places = {text: place for place, text in enumerate(dict.fromkeys(wanted))}  # most are the same: encoded once
    return Cond(cond.tensors, teacher.condition(list(places)).rows(torch.tensor([places[text] for text in wanted])))
