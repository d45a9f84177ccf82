"""Tensors out of a pickle: torch's storages, each a small file within the file, and the views of them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bootcli_edm.opcodes import Built, Meter, Name, read_pickle
from bootcli_edm.refusal import Refused

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    Name("torch", f"{kind}Storage"): dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
    }.items()
}


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors.

    Args:
        values: one dimension.
    """

    values: Tensor


def read_storage(meter: Meter, payload: object) -> Storage:
    """What ``torch.storage._load_from_bytes`` would have loaded: torch's format before it was a zip file.

    It is a row of pickles (magic number, protocol, facts of the machine, the storage as a persistent id, the keys) and
    then the length and the numbers. Raises `Refused` for anything else.

    Args:
        meter: of the file.
        payload: the bytes of the storage.
    """
    if not isinstance(payload, bytes):
        raise Refused("a storage of it is no bytes")
    meter.unpack(len(payload))
    stream = io.BytesIO(payload)
    if _plain(stream, meter) != _MAGIC or _plain(stream, meter) != _PROTOCOL:
        raise Refused("a storage of it is not in torch's format")
    facts = _plain(stream, meter)
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise Refused("a storage of it is not little-endian")
    found = read_pickle(stream, meter, _DTYPES.__contains__, _no_calls, _persistent)
    keys = _plain(stream, meter)
    if not isinstance(found, _Header) or keys != [found.key]:
        raise Refused("a storage of it is no single storage")
    return Storage(_values(found, stream))


@dataclass(frozen=True)
class _Header:
    dtype: torch.dtype
    key: object
    length: int


def _persistent(identity: object) -> _Header:
    match identity:
        case ("storage", Name() as kind, str() as key, str(), int() as length, *views) if views in ([], [None]):
            return _Header(_DTYPES[kind], key, length)
    raise Refused("a storage of it is described in another way than torch does")


def _values(header: _Header, stream: io.BytesIO) -> Tensor:
    length = int.from_bytes(stream.read(8), "little")
    data = bytearray(stream.read())
    if length != header.length or length * header.dtype.itemsize != len(data):
        raise Refused(f"a storage of it says {header.length:,} numbers and holds {len(data):,} bytes")
    return torch.frombuffer(data, dtype=header.dtype) if data else torch.empty(0, dtype=header.dtype)


def _plain(stream: io.BytesIO, meter: Meter) -> object:
    """A pickle of plain values."""
    return read_pickle(stream, meter, lambda name: False, _no_calls)


def _no_calls(call: Built) -> object:
    raise Refused(f"a storage of it calls {call.what}")


def view_of(storage: object, offset: object, size: object, stride: object) -> Tensor:
    """A tensor on a storage. Raises `Refused` for one that reaches beyond it, or is larger than it."""
    if not isinstance(storage, Storage) or not isinstance(offset, int):
        raise Refused("a tensor of it has no storage")
    shape, strides = _whole(size), _whole(stride)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if offset < 0 or count > len(storage.values) or (count and last >= len(storage.values)):
        raise Refused(f"a tensor of it, {tuple(shape)}, is larger than its storage")
    return torch.as_strided(storage.values, shape, strides, offset)


def _whole(values: object) -> Sequence[int]:
    if not isinstance(values, tuple) or len(values) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in values):
        raise Refused("the shape of a tensor of it is not a few whole numbers")
    return values
