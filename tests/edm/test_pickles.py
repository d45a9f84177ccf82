"""EDM pickles: what is read, and that nothing in a file is ever run."""

from __future__ import annotations

import io
import pickle
import random
import struct
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bootcli_edm.opcodes
import numpy as np
import pytest
import torch
from bootcli_edm.architecture import Architecture
from bootcli_edm.opcodes import Built, Meter, Name, read_pickle
from bootcli_edm.persistence import check, is_allowed, read_checkpoint
from bootcli_edm.refusal import Refused, shown
from bootcli_edm.storages import Storage, read_storage, view_of
from bootcli_edm.teacher import EDMTeacher, load
from edm_pickle import EasyDict, Persistent, Pickler, named_as_there
from torch import nn

from bootcli.errors import BootError

from .conftest import ADM, SONG, MakePickle

MARK = b"\x8c\x17torch_utils.persistence0"  # on the stack and off it: what an EDM pickle is recognised by


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(
    ("class_name", "arguments"), [("EDMPrecond", SONG), ("VPPrecond", SONG), ("EDMPrecond", ADM), ("iDDPMPrecond", ADM)]
)
def test_a_network_comes_out_as_it_went_in(
    make_pickle: MakePickle, class_name: str, arguments: dict[str, Any], snapshot: bool
) -> None:
    stored = read_checkpoint(make_pickle(class_name, arguments, snapshot=snapshot))
    torch.manual_seed(0)
    architecture = Architecture(class_name, arguments)
    expected = architecture.build().state_dict()
    assert stored.class_name == class_name
    assert stored.arguments == arguments
    assert stored.tensors.keys() == expected.keys()
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in expected.items())
    assert stored.dropped == (("loss_fn", "augment_pipe", "dataset_kwargs") if snapshot else ())
    assert Architecture(stored.class_name, stored.arguments).load(stored.tensors)


def dumped(content: object, protocol: int = 4) -> bytes:
    """Pickled under the names of NVlabs' code."""
    buffer = io.BytesIO()
    with named_as_there():
        Pickler(buffer, protocol=protocol).dump(content)
    return buffer.getvalue()


def read(data: bytes) -> Any:
    meter = Meter(len(data))
    return read_pickle(io.BytesIO(data), meter, is_allowed, lambda call: check(call, meter))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_values_come_out_as_they_went_in(protocol: int) -> None:
    values = [
        *(0, 1, 255, 65536, -1, 2**31, 2**70, -(2**70), 1.5, float("inf"), True, False, None),
        *("", "word", "w" * 300, "Ünïcode", b"", b"bytes", b"b" * 300),
        *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {}, {"a": 1}, {"a": 1, 2: [3]}, {1, 2}),
        *(np.float64(0.25), np.float32(0.25), np.int64(-3), np.bool_(True), np.uint8(200)),
    ]
    again = read(dumped(values, protocol))
    assert again == values
    shared = [1]
    one, other = read(dumped([shared, shared], protocol))
    assert one is other


def test_a_dictionary_of_any_kind_is_one() -> None:
    ordered, easy = read(dumped([OrderedDict(a=1), EasyDict(b=2)]))
    assert (ordered.what, ordered.items) == (Name("collections", "OrderedDict"), {"a": 1})
    assert (easy.what, easy.items) == (Name("dnnlib.util", "EasyDict"), {"b": 2})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]
)
def test_tensors_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = [whole, whole.T, whole[1:3, ::2], whole[2], torch.empty(0, dtype=dtype), torch.tensor(3, dtype=dtype)]
    again = read(dumped(tensors))
    for tensor, copy in zip(tensors, again, strict=True):
        assert copy.dtype == dtype
        assert torch.equal(copy, tensor)
    parameter = read(dumped(nn.Parameter(torch.ones(2))))
    assert torch.equal(parameter, torch.ones(2))


# --- what would run code -------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def touch(target: Path) -> bytes:
    return call("os", "system", text(f"touch {target}"))


def network(state: bytes) -> bytes:
    """``{"ema": EDMPrecond}`` with this state."""
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("EDMPrecond")
    meta += text("version") + b"K\x06" + text("module_src") + text("") + text("state") + state + b"u"
    return b"}" + text("ema") + call("torch_utils.persistence", "_reconstruct_persistent_obj", meta) + b"s"


def state_with(name: str, value: bytes) -> bytes:
    return (
        b"}("
        + text("_parameters")
        + b"}"
        + text("_buffers")
        + b"}"
        + text("_modules")
        + b"}"
        + text(name)
        + value
        + b"u"
    )


def storage_of(*pickles: bytes, rest: bytes = struct.pack("<qf", 1, 0)) -> bytes:
    return call("torch.storage", "_load_from_bytes", data(b"".join(pickles) + rest))


def plain(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


HEAD = [plain(0x1950A86A20F9469CFC6C), plain(1001), plain({"little_endian": True})]
IDENTITY = b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01NtQ."
KEYS = plain(["0"])

SMUGGLED: dict[str, Callable[[Path], bytes]] = {
    "a function, called": touch,
    "a function, under the network": lambda to: network(state_with("_init_kwargs", touch(to))),
    "a function, as an argument of the network": lambda to: network(
        state_with("_init_kwargs", b"}" + text("label_dim") + touch(to) + b"s")
    ),
    "a function, in what is left out": lambda to: network(b"}") + text("loss_fn") + touch(to) + b"s",
    "a function, in the source": lambda to: network(b"}").replace(
        text("module_src") + text(""), text("module_src") + touch(to)
    ),
    "a builtin": lambda to: call("builtins", "exec", text(f"open({str(to)!r}, 'w')")),
    "a builtin that finds others": lambda to: call("builtins", "getattr", b"cos\nsystem\n" + text("__call__")),
    "a module of torch": lambda to: call("torch", "load", text(str(to))),
    "a module of torch, deep": lambda to: call("torch.utils.collect_env", "run", text(f"touch {to}")),
    "numpy itself": lambda to: call("numpy", "save", text(str(to)) + b"K\x01"),
    "numpy, runstring": lambda to: call("numpy.testing._private.utils", "runstring", text("1") + b"}"),
    "a numpy type of objects": lambda to: network(state_with("x", call("numpy", "dtype", text("O8")))),
    "a numpy scalar of objects": lambda to: network(
        state_with(
            "x", call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O")) + data(touch(to) + b"."))
        )
    ),
    "a state that sets another": lambda to: b"ctorch.nn.modules.container\nModuleDict\n)\x81" + touch(to) + b"b",
    "a state for a class": lambda to: (
        b"ctorch.nn.modules.container\nModuleDict\n}" + text("__setstate__") + b"cos\nsystem\nsb"
    ),
    "a state twice": lambda to: b"ctorch.nn.modules.container\nModuleDict\n)\x81}b}b",
    "copyreg, the old way": lambda to: call("copyreg", "_reconstructor", b"cos\nsystem\ncbuiltins\nobject\nN"),
    "copyreg, the new way": lambda to: call("copyreg", "__newobj__", b"csubprocess\nPopen\n" + text(f"touch {to}")),
    "copyreg, an extension": lambda to: b"\x82\x01",
    "copyreg, a wide extension": lambda to: b"\x84\x01\x00\x00\x00",
    "an instance, the old way": lambda to: b"(" + text(f"touch {to}") + b"ios\nsystem\n",
    "an object, the old way": lambda to: b"(cos\nsystem\n" + text(f"touch {to}") + b"o",
    "a new object": lambda to: b"csubprocess\nPopen\n" + text(f"touch {to}") + b"\x85\x81",
    "a new object with keywords": lambda to: b"csubprocess\nPopen\n)}\x92",
    "a name from the stack": lambda to: text("posix") + text("system") + b"\x93" + text(f"touch {to}") + b"\x85R",
    "a name with dots": lambda to: (
        text("torch.nn.modules.container") + text("os.system") + b"\x93" + text(f"touch {to}") + b"\x85R"
    ),
    "a name by protocol 2": lambda to: call("__builtin__", "eval", text(f"open({str(to)!r}, 'w')")),
    "a persistent id": lambda to: text(str(to)) + b"Q",
    "a persistent id, as text": lambda to: b"P" + str(to).encode() + b"\n",
    "a buffer from elsewhere": lambda to: b"\x97",
    "a call of data": lambda to: text("os.system") + text(f"touch {to}") + b"\x85R",
    "the function of torch, with a file of its own": lambda to: call(
        "torch.storage", "_load_from_bytes", data(b"\x80\x02" + touch(to) + b".")
    ),
    "a storage that calls, first": lambda to: storage_of(b"\x80\x02" + touch(to) + b".", *HEAD[1:], IDENTITY, KEYS),
    "a storage that calls, in its facts": lambda to: storage_of(
        *HEAD[:2], b"\x80\x02" + touch(to) + b".", IDENTITY, KEYS
    ),
    "a storage that calls, as its identity": lambda to: storage_of(*HEAD, b"\x80\x02" + touch(to) + b".", KEYS),
    "a storage that calls, in its identity": lambda to: storage_of(
        *HEAD, IDENTITY.replace(text("cpu"), touch(to)), KEYS
    ),
    "a storage of another kind": lambda to: storage_of(
        *HEAD, IDENTITY.replace(b"ctorch\nFloatStorage", b"cos\nsystem"), KEYS
    ),
    "a storage that calls, in its keys": lambda to: storage_of(*HEAD, IDENTITY, b"\x80\x02" + touch(to) + b"."),
    "a storage that is a module": lambda to: storage_of(
        *HEAD, b"\x80\x02(" + text("module") + b"cos\nsystem\n" + text("f") + text("s") + b"tQ.", KEYS
    ),
    "a second pickle behind the first": lambda to: network(b"}") + b".\x80\x04" + touch(to),
}


SAID = {
    "a function, called": "asks for 'os.system'",
    "a function, under the network": "asks for 'os.system'",
    "a function, as an argument of the network": "asks for 'os.system'",
    "a function, in what is left out": "asks for 'os.system'",
    "a function, in the source": "asks for 'os.system'",
    "a builtin": "asks for 'builtins.exec'",
    "a builtin that finds others": "asks for 'builtins.getattr'",
    "a module of torch": "asks for 'torch.load'",
    "a module of torch, deep": "asks for 'torch.utils.collect_env.run'",
    "numpy itself": "asks for 'numpy.save'",
    "numpy, runstring": "asks for 'numpy.testing",
    "a numpy type of objects": r"asks for numpy.dtype\('O8'\)",
    "a numpy scalar of objects": r"asks for numpy.dtype\('O'\)",
    "a state that sets another": "asks for 'os.system'",
    "a state for a class": "asks for 'os.system'",
    "a state twice": "gives a state to something",
    "copyreg, the old way": "asks for 'copyreg._reconstructor'",
    "copyreg, the new way": "asks for 'copyreg.__newobj__'",
    "copyreg, an extension": "uses EXT1",
    "copyreg, a wide extension": "uses EXT4",
    "an instance, the old way": "uses INST",
    "an object, the old way": "asks for 'os.system'",
    "a new object": "asks for 'subprocess.Popen'",
    "a new object with keywords": "asks for 'subprocess.Popen'",
    "a name from the stack": "asks for 'posix.system'",
    "a name with dots": "asks for 'torch.nn.modules.container.os.system'",
    "a name by protocol 2": "asks for '__builtin__.eval'",
    "a persistent id": "uses BINPERSID",
    "a persistent id, as text": "uses PERSID",
    "a buffer from elsewhere": "uses NEXT_BUFFER",
    "a call of data": "calls something that is no name",
    "the function of torch, with a file of its own": "asks for 'os.system'",
    "a storage that calls, first": "asks for 'os.system'",
    "a storage that calls, in its facts": "asks for 'os.system'",
    "a storage that calls, as its identity": "asks for 'os.system'",
    "a storage that calls, in its identity": "asks for 'os.system'",
    "a storage of another kind": "asks for 'os.system'",
    "a storage that calls, in its keys": "asks for 'os.system'",
    "a storage that is a module": "asks for 'os.system'",
    "a second pickle behind the first": "something follows its pickle",
}


def smuggled(name: str, target: Path) -> bytes:
    return b"\x80\x04" + MARK + SMUGGLED[name](target) + b"."


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_in_a_file_is_run(name: str, tmp_path: Path) -> None:
    target, file = tmp_path / "made", tmp_path / "evil.pkl"
    file.write_bytes(smuggled(name, target))
    with pytest.raises(BootError, match=rf"was refused: .*{SAID[name]}.*\. Nothing in it was executed\."):
        load(file)
    assert list(tmp_path.iterdir()) == [file]


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """An unpickler that executes would have made the file: the tests above test something."""
    target = tmp_path / "made"
    for name in ("a function, called", "a builtin", "an instance, the old way", "a name from the stack"):
        pickle.loads(smuggled(name, target))
        assert target.exists(), name
        target.unlink()


# --- what is broken ------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_or_flipped_is_refused_or_read(make_pickle: MakePickle, tmp_path: Path) -> None:
    good = make_pickle("EDMPrecond", SONG, snapshot=True).read_bytes()
    draw = random.Random(0)
    file = tmp_path / "damaged.pkl"
    refused = 0
    for i in range(100):
        damaged = bytearray(good)
        if i % 4 == 0:
            damaged = damaged[: draw.randrange(len(good))]
        else:
            for _ in range(1 + i % 3):
                damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            assert isinstance(load(file), EDMTeacher)
        except BootError:
            refused += 1
    assert refused >= 25  # every cut one at least


def test_every_byte_of_the_opcodes_may_be_flipped(make_pickle: MakePickle) -> None:
    """Numbers are most of a file: here what is flipped is what a reader reads."""
    state = state_with("_init_kwargs", b"}" + text("img_resolution") + b"K\x08s")
    good = b"\x80\x04" + network(state) + b"."
    assert read(good)
    for place in range(2, len(good)):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            with suppress(Refused):
                read(bytes(damaged))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\x80\x04N.", "the file is no dictionary"),
        (b"\x80\x04}.", "no network under 'ema'; it holds nothing"),
        (b"\x80\x04}" + text("G") + b"K\x01s.", "no network under 'ema'; it holds G"),
        (b"\x80\x04" + network(b"K\x01") + b".", "EDMPrecond is no dictionary"),
        (b"\x80\x04" + network(state_with("_modules", b"}" + text("model") + b"K\x01s")) + b".", "model. is no module"),
        (b"\x80\x04" + network(state_with("_init_kwargs", b"}" + text("label_dim") + b"}s")) + b".", "label_dim"),
        (
            b"\x80\x04" + network(state_with("_init_args", b"]\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b"a")) + b".",
            "argument 0",
        ),
        (b"\x80\x04" + b"}\x94(" + b"h\x00h\x00u.", "a key that no file needs, of type dict"),
        (b"\x80\x04}", "cut short"),
        (b"\x80\x04}}.", "does not end with one object"),
        (b"\x80\x04(.", "does not end with one object"),
        (b"\x80\x040.", "cut short"),
        (b"\x80\x04h\x07.", "cut short"),
        (b"\x80\x04K\x01K\x02a.", "appends to something"),
        (b"\x80\x04K\x01K\x02K\x03s.", "sets an item"),
        (b"\x80\x04}(K\x01u.", "cut short or damaged"),
        (b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "BYTEARRAY8|cut short"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cut short"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f.", "cut short"),
    ],
)
def test_what_is_no_network_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "network.pkl"
    file.write_bytes(content)
    with pytest.raises(BootError, match=message):
        load(file)


def test_a_pickle_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootcli_edm.opcodes, "MOST_OPCODES", 1000)
    with pytest.raises(Refused, match="no end"):
        read(b"\x80\x04" + b"N0" * 1000 + b"N.")


def test_nests_of_any_depth_are_no_trouble() -> None:
    deep = b"\x80\x04)" + b"\x85" * 200_000 + b"."
    assert isinstance(read(deep), tuple)
    with pytest.raises(Refused, match="of type tuple"):
        read(b"\x80\x04})" + b"\x85" * 200_000 + b"K\x01s.")


def test_a_nest_without_end_is_not_written_out() -> None:
    """The same value twice, and that pair twice, and so on: a few bytes hold 2^60 values."""
    nest = b")" + b"2\x86" * 60
    with pytest.raises(Refused, match="which is no number"):
        read(b"\x80\x04cnumpy.core.multiarray\nscalar\n" + b"cnumpy\ndtype\n" + nest + b"\x85RK\x01\x86R.")
    assert shown([read(b"\x80\x04" + nest + b".")]) == "list"
    assert shown(10**5000) == "int"
    assert shown([1, "two"]) == "[1, 'two']"


def test_keys_chosen_to_collide_are_refused() -> None:
    collide = b"".join(b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 9))
    with pytest.raises(Refused, match="of type int"):
        read(b"\x80\x04}(" + collide + b"u.")
    with pytest.raises(Refused, match="of type int"):  # nor places in the memo
        read(b"Np%d\n." % 2**61)


def again(count: int) -> bytes:
    """The value on the stack is forgotten, and asked for anew, so many times."""
    return b"0" + (b"h\x07h\x08R0" * count)


def test_a_short_file_cannot_ask_for_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same storage over and over, each time unpacked: ten thousand times its bytes, for five each."""
    payload = b"".join([*HEAD, IDENTITY, KEYS]) + struct.pack("<q", 1) + bytes(4)
    first = b"ctorch.storage\n_load_from_bytes\nq\x07(" + data(payload) + b"tq\x08R"
    assert isinstance(read(b"\x80\x04" + first + b"."), Storage)
    with pytest.raises(Refused, match="unpacks to more than it holds"):
        read(b"\x80\x04" + first + again(500) + b"N.")
    monkeypatch.setattr(bootcli_edm.opcodes, "MOST_OPCODES", 20)
    with pytest.raises(Refused, match="no end"):  # the steps in a storage count too
        read(b"\x80\x04" + first + b".")
    assert read(b"\x80\x04" + b"N0" * 8 + b"N.") is None
    monkeypatch.setattr(bootcli_edm.opcodes, "MOST_OPCODES", 150)
    words = b"(" + b"".join(text(str(i)) for i in range(50)) + b"l"
    sets = b"cbuiltins\nset\nq\x07(" + words + b"tq\x08R"
    with pytest.raises(Refused, match="no end"):
        read(b"\x80\x04" + sets + again(1) + b"N.")


def test_names_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "network.pkl"
    shared = b"}q\x07(" + b"".join(text(str(i)) + b"N" for i in range(2000)) + b"u"
    children = b"}(" + b"".join(
        text(str(i)) + b"ctorch.nn.modules.container\nModuleDict\n)\x81}" + text("_modules") + b"h\x07sb"
        for i in range(60)
    )
    state = b"}(" + text("_modules") + children + b"uu"
    file.write_bytes(b"\x80\x04" + shared + b"0" + network(state) + b".")
    with pytest.raises(BootError, match="no end"):
        load(file)
    long = state_with("_modules", b"}" + text("n" * 2000) + b"ctorch.nn.modules.container\nModuleDict\n)\x81}bs")
    file.write_bytes(b"\x80\x04" + network(long) + b".")
    with pytest.raises(BootError, match="no end"):
        load(file)


def test_modules_in_a_ring_are_refused(tmp_path: Path) -> None:
    container = b"ctorch.nn.modules.container\nModuleDict\n)\x81\x94"
    ring = container + b"}" + text("_modules") + b"}" + text("a") + b"h\x00ssb"
    file = tmp_path / "network.pkl"
    file.write_bytes(b"\x80\x04" + network(state_with("_modules", b"}" + text("model") + ring + b"s")) + b".")
    with pytest.raises(BootError, match="no end"):
        load(file)


def storage(payload: object) -> Storage:
    return read_storage(Meter(10_000), payload)


def test_a_storage_says_its_size() -> None:
    good = b"".join([*HEAD, IDENTITY, KEYS])
    assert storage(good + struct.pack("<qf", 1, 2.5)).values.tolist() == [2.5]
    for rest in (
        struct.pack("<qf", 2, 2.5),
        struct.pack("<q", 1),
        struct.pack("<qff", 1, 0, 0),
        b"",
        struct.pack("<qf", -1, 0),
    ):
        with pytest.raises(Refused):
            storage(good + rest)
    huge = good.replace(b"K\x01N", b"\x8a\x08" + struct.pack("<q", 2**60) + b"N")
    with pytest.raises(Refused, match="1,152,921,504,606,846,976 numbers"):
        storage(huge + struct.pack("<qf", 2**60, 0))
    for other in (b"PK\x03\x04", plain(5) + good, good[len(HEAD[0]) :], None):
        with pytest.raises(Refused):
            storage(other)
    big_endian = b"".join([*HEAD[:2], plain({"little_endian": False}), IDENTITY, KEYS]) + struct.pack(">qf", 1, 2.5)
    with pytest.raises(Refused, match="little-endian"):
        storage(big_endian)


@pytest.mark.parametrize(
    "view",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (6, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**12,), (0,)),  # one number, seen a million million times
        (0, (2**39, 2**39), (0, 0)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (0.0, (2,), (1,)),
        (0, [2], [1]),
    ],
)
def test_a_tensor_stays_in_its_storage(view: tuple[Any, Any, Any]) -> None:
    storage = Storage(torch.arange(6.0))
    with pytest.raises(Refused):
        view_of(storage, *view)
    assert view_of(storage, 1, (2, 2), (2, 1)).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(Refused):
        view_of(torch.arange(6.0), 0, (2,), (1,))


def test_persistent_objects_are_inert() -> None:
    record = read(dumped(Persistent("EDMLoss", {"P_mean": -1.2})))
    assert record.class_name == "EDMLoss"
    assert record.state == {"P_mean": -1.2}
    assert isinstance(read(dumped(nn.ModuleDict())), Built)
