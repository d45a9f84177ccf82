"""Finds teachers: which families are installed, what a name means, and how to load it. Light: torch only in `load`.

A family is announced by an entry point of the group ``bootcli.teachers``. One that is broken is listed with its error
and stands in nobody's way until it is asked for.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from bootcli.errors import BootError, UsageError
from bootcli.paths import expanded
from bootcli.teachers.family import Alias, TeacherFamily, readers_of

if TYPE_CHECKING:
    from bootcli.teachers.protocol import Teacher

GROUP = "bootcli.teachers"
SWITCH = "BOOTCLI_PLUGINS"
"""Environment variable: distributions, comma separated, whose plugins are used beside bootcli's own. Unset: all."""

LOCAL = "local path"
"""The origin of a teacher that lies on this machine."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Installed:
    """One entry point.

    Args:
        name: of the family.
        distribution: the installed package that brings it, with its version.
        family: None where it could not be loaded.
        error: why it cannot be used; empty for a good one.
    """

    name: str
    distribution: str
    family: TeacherFamily | None = None
    error: str = ""


@dataclass(frozen=True)
class Resolved:
    """What a teacher's name means, before anything heavy happens.

    Args:
        family: None for a hub id, whose family shows only in its files.
        source: a local path or a hub id.
        origin: where it comes from, for people.
        on_hub: whether ``source`` is a hub id.
    """

    family: TeacherFamily | None
    source: str
    origin: str
    on_hub: bool = False


@dataclass(frozen=True)
class Loaded:
    """A teacher with its weights, and what `Resolved` says of it."""

    teacher: Teacher
    family: TeacherFamily
    source: str
    origin: str


def installed() -> list[Installed]:
    """Every family found, good or not, by name."""
    points = [point for point in entry_points(group=GROUP) if _wanted(point)]
    found = [_inspect(point) for point in sorted(points, key=lambda point: (point.name, _distribution(point)))]
    times = Counter(one.name for one in found)
    return [replace(one, error=_clash(one.name, found)) if times[one.name] > 1 else one for one in found]


def family_named(name: str) -> TeacherFamily:
    """The family called ``name``. Raises `UsageError` where it is missing, broken or not unique."""
    families = installed()
    for one in families:
        if one.name == name:
            return _usable(one)
    near = difflib.get_close_matches(name, [one.name for one in families])
    raise UsageError(f"No teacher family {name!r} is installed.", _did_you_mean(near, "See: bootcli teachers"))


def resolve(name: str) -> Resolved:
    """What ``name`` means: ``family:source``, an alias, a local path or a hub id, in this order.

    Raises `UsageError` for a name that means nothing or too much, `BootError` for a path that no family reads.
    """
    families = installed()
    prefix, colon, rest = name.partition(":")
    for one in families:
        if colon and one.name == prefix:
            return _within(one, rest)
    owners = [one for one in families if one.family and name in one.family.aliases]
    if owners:
        return _alias(name, owners)
    path = expanded(name)
    if name and path.exists():
        return Resolved(_reader(path, families), str(path), LOCAL)
    if _HUB_ID.fullmatch(name):
        return _hub(None, name)
    raise _unknown(name, families)


def load(name: str) -> Loaded:
    """The teacher behind ``name`` with its weights, fetched from the hub where it has to be."""
    found = resolve(name)
    family, path = _files_of(found)
    return Loaded(family.load(path), family, found.source, found.origin)


def locate(name: str) -> Path:
    """Where the files of the teacher behind ``name`` are, fetched from the hub where they have to be."""
    return _files_of(resolve(name))[1]


def _files_of(found: Resolved) -> tuple[TeacherFamily, Path]:
    from bootcli.teachers.hub import fetch

    if found.on_hub:
        return fetch(found.source, [found.family] if found.family else _good(installed()))
    assert found.family is not None  # only a hub id leaves it open
    return found.family, Path(found.source)


def _wanted(point: EntryPoint) -> bool:
    chosen = os.environ.get(SWITCH)
    if chosen is None:
        return True
    names = {_normal(part) for part in ["bootcli", *chosen.split(",")]}
    return point.dist is not None and _normal(point.dist.name) in names


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).strip().lower()


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def _inspect(point: EntryPoint) -> Installed:
    distribution = _distribution(point)
    try:
        family = point.load()
    except (Exception, SystemExit) as error:  # whatever a third party's import does
        return Installed(point.name, distribution, error=f"{type(error).__name__}: {error}")
    if not isinstance(family, TeacherFamily):
        return Installed(point.name, distribution, error=f"{point.value} is not a TeacherFamily")
    if family.name != point.name:
        return Installed(point.name, distribution, error=f"its family calls itself {family.name!r}")
    return Installed(point.name, distribution, family)


def _clash(name: str, found: Sequence[Installed]) -> str:
    owners = " and ".join(one.distribution for one in found if one.name == name)
    return f"two plugins are called {name!r}: {owners}"


def _good(families: Sequence[Installed]) -> list[TeacherFamily]:
    return [one.family for one in families if one.family and not one.error]


def _usable(one: Installed) -> TeacherFamily:
    if one.error or one.family is None:
        raise UsageError(
            f"The teacher family {one.name!r} of {one.distribution} cannot be used: {one.error}.",
            f"Repair or uninstall a plugin, or choose which ones are used with {SWITCH}; see: bootcli teachers --help",
        )
    return one.family


def _within(one: Installed, source: str) -> Resolved:
    """``family:source``, where the family is not in doubt."""
    family = _usable(one)
    if source in family.aliases:
        return _alias(source, [one])
    path = expanded(source)
    if source and path.exists():
        return Resolved(family, str(path), LOCAL)
    if _HUB_ID.fullmatch(source):
        return _hub(family, source)
    raise _unknown(source, [one])


def _alias(name: str, owners: Sequence[Installed]) -> Resolved:
    families = [_usable(one) for one in owners]
    if len(families) > 1:
        ways = " or ".join(f"{family.name}:{name}" for family in families)
        raise UsageError(f"Several families have a teacher {name!r}.", f"Say which: {ways}")
    source = families[0].aliases[name].source
    if Path(source).is_absolute():
        return Resolved(families[0], source, f"in {owners[0].distribution}")
    return _hub(families[0], source)


def _hub(family: TeacherFamily | None, hub_id: str) -> Resolved:
    return Resolved(family, hub_id, f"huggingface.co/{hub_id}", on_hub=True)


def _reader(path: Path, families: Sequence[Installed]) -> TeacherFamily:
    """The one family that reads ``path``."""
    good = _good(families)
    readers, broken = readers_of(path, good)
    if len(readers) == 1:
        return readers[0]
    if readers:
        ways = " or ".join(f"{family.name}:{path}" for family in readers)
        raise UsageError(f"Several families read {path}.", f"Say which: {ways}")
    accepted = [f"{family.name}: {line}" for family in good for line in family.accepts]
    broken += [f"(not tried: {one.name}, {one.error})" for one in families if one.error]
    raise BootError(f"No installed teacher family reads {path}.", "\n".join(["Accepted:", *accepted, *broken]))


def _unknown(name: str, families: Sequence[Installed]) -> UsageError:
    aliases: dict[str, Alias] = {}
    for one in families:
        aliases |= one.family.aliases if one.family else {}
    near = difflib.get_close_matches(name, aliases, n=3)
    broken = "".join(f" (The plugin {one.name!r} is broken: {one.error}.)" for one in families if one.error)
    if re.match(r"[.~/\\]", name):
        return UsageError(f"{name} does not exist.", "Check the path of the teacher's folder." + broken)
    general = "Name one that `bootcli teachers` lists, a folder (./name) or a hub id (owner/name)."
    return UsageError(f"Unknown teacher {name!r}.", _did_you_mean(near, general) + broken)


def _did_you_mean(near: Sequence[str], otherwise: str) -> str:
    if not near:
        return otherwise
    *others, last = near
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"
