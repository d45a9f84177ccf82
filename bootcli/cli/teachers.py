"""`bootcli teachers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bootcli.cli.common import print_json, to_toml
from bootcli.cli.options import JsonOption, at_home, examples
from bootcli.errors import UsageError

if TYPE_CHECKING:
    from bootcli.teachers.registry import Installed, Loaded

EXAMPLES = examples("bootcli teachers", "bootcli teachers edm.pkl --convert edm.safetensors")

TeacherArgument = Annotated[
    str | None,
    typer.Argument(metavar="NAME|PATH|HUB_ID", help="A teacher to load and describe.", show_default="list them all"),
]


ConvertOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write it as a new file in its family's own form, which cannot run code.",
        callback=at_home,
    ),
]


def teachers(teacher: TeacherArgument = None, convert: ConvertOption = None, as_json: JsonOption = False) -> None:
    """List the installed teachers, or show what is found in one.

    A plugin is a package with an entry point in the group bootcli.teachers.
    The variable BOOTCLI_PLUGINS names the packages to use beside bootcli itself,
    with commas between. Unset means all, empty means none.
    """
    if teacher is not None:
        _show(teacher, convert, as_json)
        return
    if convert is not None:
        raise UsageError(
            "--convert: name the teacher to convert.", "For example: bootcli teachers edm.pkl --convert edm.safetensors"
        )
    from bootcli.teachers.registry import installed

    found = installed()
    print_json([_listing(one) for one in found]) if as_json else _print_list(found)


def _listing(one: Installed) -> dict[str, object]:
    family = one.family
    return {
        "family": one.name,
        "from": one.distribution,
        "error": one.error or None,
        "summary": family.summary if family else None,
        "accepts": family.accepts if family else (),
        "aliases": {name: {"source": alias.source, "summary": alias.summary} for name, alias in family.aliases.items()}
        if family
        else {},
    }


def _print_list(found: Sequence[Installed]) -> None:
    from bootcli import ui

    names = [
        (name, one.name, alias.summary) for one in found if one.family for name, alias in one.family.aliases.items()
    ]
    ui.print_table(("teacher", "family", "what it is"), names)
    for one in found:
        good = {"reads": one.family.summary, "layouts": "\n".join(one.family.accepts)} if one.family else {}
        bad = {"error": one.error} if one.error else {}
        ui.print_facts({"family": one.name, "from": one.distribution, **good, **bad})


def _show(name: str, convert: Path | None, as_json: bool) -> None:
    from bootcli import ui
    from bootcli.store.files import atomic_file
    from bootcli.teachers.registry import load

    if convert is not None:
        _check_new(convert)
    loaded = load(name)
    facts = describe(loaded)
    if convert is not None:
        with atomic_file(convert) as temporary:
            loaded.teacher.save(temporary)
        facts["converted_to"] = str(convert)
    if as_json:
        print_json(facts)
    else:
        recipe = to_toml(loaded.teacher.recipe(), comments={})
        told = {label: value for label, value in facts.items() if value or label == "terminal_snr"}  # which may be 0
        known = {label.replace("_", " "): value for label, value in told.items() if label != "details"}
        ui.print_facts({**known, **loaded.teacher.describe(), "recipe": recipe or "bootcli's defaults"})


def _check_new(file: Path) -> None:
    if file.exists():
        raise UsageError(f"--convert {file}: it exists already.", "Name a new file.")
    if file.suffix != ".safetensors":
        raise UsageError(f"--convert {file}: what is written is a .safetensors file.", "Change the file's ending.")


def describe(loaded: Loaded) -> dict[str, object]:
    """What was found in a teacher; ``details`` is what only its family can tell."""
    from bootcli.exporters import BARE

    teacher, spec = loaded.teacher, loaded.teacher.spec
    space = teacher.feature_space()
    return {
        "family": loaded.family.name,
        "source": loaded.source,
        "origin": loaded.origin,
        "sample_shape": spec.sample_shape,
        "prediction": spec.prediction,
        "conditioning": spec.conditioning,
        "classes": spec.num_classes,
        "schedule": type(spec.schedule).__name__,
        "terminal_snr": spec.schedule.terminal_snr(),
        "parameters": sum(parameter.numel() for parameter in teacher.net.parameters()),
        "feature_space": space.name if space else None,
        "export_formats": sorted({BARE, *teacher.export_formats(), *teacher.lora_formats()}),
        "recipe": teacher.recipe(),
        "details": teacher.describe(),
    }
