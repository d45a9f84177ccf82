"""The configuration of a run, new or resumed. Light: torch comes in only with a teacher's recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from bootcli.config import OWN_IMAGES, RESUMABLE, DistillConfig, check_recipe, differences, flatten, resolve, to_dict
from bootcli.errors import BootError, UsageError
from bootcli.paths import expanded
from bootcli.store.rundir import RunDir
from bootcli.teachers import registry


def resolve_config(
    flags: Mapping[str, object], overrides: Mapping[str, object], file: Mapping[str, object]
) -> DistillConfig:
    """The configuration of a new run: flags, then ``--set``, then the config file, then the teacher's recipe."""
    name = resolve(flags, overrides, file).teacher
    recipe = registry.load(name).teacher.recipe()
    try:
        check_recipe(recipe)
    except UsageError as error:
        raise BootError(f"The recipe of the teacher {name} is broken: {error.message}", error.hint) from error
    # One w or a range of it: where the user chose one of them, the recipe's other has no say.
    named = flags.keys() | overrides.keys() | file.keys()
    other = {"guidance_range": "guidance_scale", "guidance_scale": "guidance_range"}
    dropped = {other[key] for key in named & other.keys()}
    recipe = {key: value for key, value in recipe.items() if key not in dropped}
    config = resolve(flags, overrides, file, recipe)
    for key, value in overrides.items():
        _check_effect(config, key, value)
    return _whole_paths(config)


def _check_effect(config: DistillConfig, key: str, value: object) -> None:
    """Raise `UsageError` for what ``--set`` says of a part that the run does not have. A config file, as ``--dry-run``
    prints them, names those too; and to switch off what is not there does no harm."""
    adversary = config.kd.adversary if config.objective == "kd" else config.replay.adversary
    parts = {
        **{name: (config.objective == name, f"--objective {name}") for name in ("boot", "freeflow", "kd")},
        "correction": (config.corrects, "--corrector"),
        "adversary": (adversary, f"--set {'kd' if config.objective == 'kd' else 'replay'}.adversary=0.5"),
        "replay": (config.replay.share, "--set replay.share=0.25"),
        "refiner": (config.refiner.share, "--set refiner.share=0.15"),
    }
    section, _, name = key.rpartition(".")
    there, switch = parts.get(section, (True, ""))
    if not there and not (name in ("share", "adversary") and not value):
        raise UsageError(f"--set {key}: this run has no part that it belongs to.", f"Leave it out, or add {switch}.")
    if key == "student.start_t" and config.init_from is not None:
        raise UsageError(f"--set {key}: with --init-from the student starts as that one.", "Give one of them.")


def resume_config(
    run: Path, flags: Mapping[str, object], overrides: Mapping[str, object], file: Mapping[str, object]
) -> DistillConfig:
    """The stored configuration with what may change on ``--resume``: longer ``steps`` and ``max_minutes``, and what is
    shown and kept on the way (`RESUMABLE`).

    Raises `UsageError` for any other change.
    """
    stored = RunDir(run).config()
    changed = _whole_paths(resolve(flags, overrides, file, dict(flatten(to_dict(stored)))))
    refused = {
        key: values
        for key, values in differences(stored, changed).items()
        if key not in RESUMABLE and not _longer(key, *values)
    }
    if refused:
        listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in refused.items())
        raise UsageError(
            f"--resume cannot change {listed} of {run}.",
            "Only longer --steps and --max-minutes, and what is shown and kept on the way, may change; start a new run "
            "for the rest.",
        )
    return changed


def _longer(key: str, old: object, new: object) -> bool:
    """Whether a change makes the run end later; no limit is the latest."""
    if key not in ("steps", "max_minutes"):
        return False
    return new is None or (isinstance(old, int | float) and isinstance(new, int | float) and new > old)


def _whole_paths(config: DistillConfig) -> DistillConfig:
    """Paths are stored whole, so that the run can be used from anywhere."""

    def whole(path: str) -> str:
        found = expanded(path)
        regular = found.is_file() or found.is_dir()  # a pipe has no other name than the one it was given
        return str(found.resolve()) if regular else path

    def whole_reference(reference: str) -> str:  # "inception-clean:PATH"; the word for the teacher's own is no path
        prefix = match[0] if (match := re.match(r"inception-\w+:", reference)) else ""
        path = reference.removeprefix(prefix)
        return reference if path == OWN_IMAGES else prefix + whole(path)

    teacher, reference = registry.resolve(config.teacher), config.watch.reference
    local = teacher.origin == registry.LOCAL
    prefix = f"{teacher.family.name}:" if teacher.family is not None else ""
    prefix = prefix if config.teacher.startswith(prefix) else ""
    return dataclasses.replace(
        config,
        watch=dataclasses.replace(config.watch, reference=reference and whole_reference(reference)),
        teacher=prefix + whole(config.teacher.removeprefix(prefix)) if local else config.teacher,
        prompts=config.prompts and whole(config.prompts),
        init_from=config.init_from and whole(config.init_from),
    )
