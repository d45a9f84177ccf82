"""What an EDM checkpoint holds, found without running any of it.

Such a file is a pickle of a dictionary; ``ema`` is the network. Every object of NVlabs' classes is stored as a call of
``_reconstruct_persistent_obj`` with one dictionary: the source of its module (which a plain unpickler would execute,
and is only looked through for its licence here), the name of its class, and its ``__dict__``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from bootcli_edm.opcodes import Built, Meter, Name, as_key, read_pickle
from bootcli_edm.refusal import Refused, shown
from bootcli_edm.storages import read_storage, view_of

PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
STORAGE = Name("torch.storage", "_load_from_bytes")
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
DTYPE = Name("numpy", "dtype")
SCALARS = (Name("numpy.core.multiarray", "scalar"), Name("numpy._core.multiarray", "scalar"))
SET = Name("builtins", "set")
DICTIONARIES = (Name("collections", "OrderedDict"), Name("dnnlib.util", "EasyDict"))
CONTAINERS = "torch.nn.modules."

_NAMED = frozenset({PERSISTENT, STORAGE, TENSOR, PARAMETER, DTYPE, SET, *SCALARS, *DICTIONARIES})
_NUMBERS = {
    **{"f2": "e", "f4": "f", "f8": "d", "b1": "?"},
    **{
        f"{sign}{size}": code
        for sign, codes in {"i": "bhiq", "u": "BHIQ"}.items()
        for size, code in zip("1248", codes, strict=True)
    },
}
"""numpy's names of its numbers, and what `struct` calls them."""
_MOST_NAMES, _LONGEST_NAME, _MOST_ARGUMENTS = 100_000, 1000, 64


@dataclass(frozen=True)
class Record:
    """An object of one of NVlabs' classes.

    Args:
        class_name: "EDMPrecond".
        module_src: the source that comes with it.
        state: its ``__dict__``.
    """

    class_name: str
    module_src: str
    state: Mapping[object, object]


@dataclass(frozen=True)
class Stored:
    """A network as a file has it.

    Args:
        class_name: of the preconditioner.
        positional, arguments: what it was constructed with, without and with names.
        tensors: its parameters and buffers, by their names in a state dict.
        dropped: what else the file holds.
        module_src: the source that comes with it.
    """

    class_name: str
    positional: tuple[object, ...]
    arguments: dict[str, object]
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    module_src: str = field(default="", repr=False)


def read_checkpoint(path: Path) -> Stored:
    """The network in a .pkl file. Raises `Refused` for a file that holds something else."""
    meter = Meter(path.stat().st_size)
    with path.open("rb") as file:
        content = read_pickle(file, meter, is_allowed, lambda call: check(call, meter))
        if file.read(1):
            raise Refused("something follows its pickle")
    table = _table(content, "the file")
    network = table.get("ema")
    if not isinstance(network, Record):
        found = ", ".join(shown(name) for name in list(table)[:10])
        raise Refused(f"it has no network under 'ema'; it holds {found or 'nothing'}")
    return Stored(
        network.class_name,
        *_arguments(network),
        dict(_tensors(network)),
        tuple(shown(name) for name in table if name != "ema")[:10],
        network.module_src,
    )


def is_allowed(name: Name) -> bool:
    """Whether an EDM checkpoint may name it: a class of torch's modules, which stays a record, or one of the others."""
    return name in _NAMED or (name.module.startswith(CONTAINERS) and name.name.isidentifier())


def check(call: Built, meter: Meter) -> object:
    """The value of a call that is understood; the others stay as they are. See `bootcli_edm.opcodes.Check`."""
    what, arguments = call.what, call.arguments
    try:
        if what == PERSISTENT:
            return _record(*arguments)
        if what == STORAGE:
            return read_storage(meter, *arguments)
        if what == TENSOR:
            return view_of(*arguments[:4])
        if what == PARAMETER:
            return _parameter(*arguments)
        if what == DTYPE:
            _number_code(call)
        if what in SCALARS:
            return _number(*arguments)
        if what == SET:
            return _set(meter, *arguments)
    except (TypeError, ValueError, struct.error) as error:
        raise Refused(f"it calls {what} in a way that nothing does ({shown(error)})") from None
    return call


def _record(meta: object) -> Record:
    match meta:
        case {"type": "class", "class_name": str() as name, "module_src": str() as source, "state": state}:
            return Record(name, source, _table(state, shown(name)))
    raise Refused("it has a persistent object that is no class with a state")


def _parameter(data: object, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter of it is no tensor")
    return data


def _set(meter: Meter, values: object = ()) -> set[object]:
    if not isinstance(values, list | tuple):
        raise Refused("it has a set of what is no list")
    meter.work(len(values))
    return set(map(as_key, values))


def _number_code(dtype: object) -> str:
    match dtype:
        case Built(what, (str() as code, *_)) if what == DTYPE and code in _NUMBERS:
            return _NUMBERS[code]
        case Built(what, (code, *_)) if what == DTYPE:
            raise Refused(f"it asks for numpy.dtype({shown(code)!r}), which is no number")
    raise Refused("a numpy scalar of it has no type")


def _number(dtype: object, data: object) -> object:
    code = _number_code(dtype)
    state = cast(Built, dtype).state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "<"
    if not isinstance(data, bytes):
        raise Refused("a numpy scalar of it is no bytes")
    return struct.unpack(f"{order}{code}", data)[0]


def _table(value: object, owner: str) -> Mapping[object, object]:
    """A dictionary of any of the kinds that occur."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Built) and value.what in DICTIONARIES:
        return cast(Mapping[object, object], value.items)
    raise Refused(f"{owner} is no dictionary")


def _arguments(network: Record) -> tuple[tuple[object, ...], dict[str, object]]:
    """Without and with names."""
    positional = network.state.get("_init_args", ())
    named = _table(network.state.get("_init_kwargs", {}), "_init_kwargs")
    if not isinstance(positional, tuple | list):
        raise Refused("the arguments of its network are no list")
    if len(positional) + len(named) > _MOST_ARGUMENTS:
        raise Refused("its network has too many arguments")
    values = tuple(_simple(value, place) for place, value in enumerate(positional))
    return values, {shown(name): _simple(value, name) for name, value in named.items()}


def _simple(value: object, name: object) -> object:
    """A scalar, or a list of scalars."""
    if isinstance(value, list | tuple):
        flat = not any(isinstance(item, list | tuple) for item in value[:_MOST_ARGUMENTS])
        if flat and len(value) <= _MOST_ARGUMENTS:
            return [_simple(item, name) for item in value]
    small = not isinstance(value, int) or abs(value) < 2**63
    if value is None or (small and isinstance(value, bool | int | float | str)):
        return value
    raise Refused(f"the argument {shown(name)} of its network is neither a number nor a word nor a list of them")


def _tensors(network: Record) -> Iterator[tuple[str, Tensor]]:
    """What `nn.Module.state_dict` would have given."""
    waiting: list[tuple[str, object]] = [("", network)]
    names = 0
    while waiting:
        prefix, module = waiting.pop()
        for name, value in _members(module, prefix):
            names += 1
            full = f"{prefix}{name!s:.{_LONGEST_NAME}}"
            if names > _MOST_NAMES or len(full) >= _LONGEST_NAME:
                raise Refused("its modules have no end")
            if isinstance(value, Tensor):
                yield full, value
            elif value is not None:
                waiting.append((f"{full}.", value))


def _members(module: object, prefix: str) -> Iterator[tuple[object, object]]:
    """The parameters, buffers and modules of a module; None for one that there is not, or that no state dict has."""
    state = _state(module, prefix)
    hidden = state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in _table(state.get(kind, {}), shown(prefix)).items():
            yield name, None if isinstance(hidden, set) and name in hidden else value


def _state(module: object, prefix: str) -> Mapping[object, object]:
    if isinstance(module, Record):
        return module.state
    if isinstance(module, Built) and module.what.module.startswith(CONTAINERS):
        return _table(module.state, shown(prefix))
    raise Refused(f"{shown(prefix) or 'its network'} is no module")
