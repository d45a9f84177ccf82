"""A reader of pickles that has no way to call anything.

Python's unpickler builds objects by calling what the file names. This one walks the opcodes (`pickletools.genops`) and
leaves every object as an inert `Built`: the name of what should have been called, and with what. Names that are not
expected are refused where they occur, used or not, and so are the opcodes that reach outside of the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from bootcli_edm.refusal import Refused, shown

MOST_OPCODES = 5_000_000
"""A network of 1,000 layers has 200,000; more than this is no network, and would take minutes."""
_LARGEST_KEY = 2**31

Key = str | bytes | int | None


@dataclass(frozen=True)
class Name:
    """A class or function that the file names. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Built:
    """An object that was not made.

    Args:
        what: the class or function that should have been called.
        arguments: with what.
        state: what it should have been given afterwards; None: nothing.
        items: what should have been set in it, as in a dictionary.
    """

    what: Name
    arguments: tuple[object, ...]
    state: object = None
    items: dict[Key, object] = field(default_factory=dict)


Check = Callable[[Built], object]
"""Looks at a call when the file asks for it; what it returns stands for the object. Raises `Refused`."""

_SCALARS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class Meter:
    """What reading one file may cost, nested pickles included: a short file can ask for much.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.opcodes, self.unpacked = MOST_OPCODES, size

    def work(self, amount: int = 1) -> None:
        """Raise `Refused` where the file has had enough steps."""
        self.opcodes -= amount
        if self.opcodes < 0:
            raise Refused("it has no end in sight")

    def unpack(self, size: int) -> None:
        """Raise `Refused` where the file has given more bytes than it has."""
        self.unpacked -= size
        if self.unpacked < 0:
            raise Refused("it unpacks to more than it holds")


def read_pickle(
    stream: IO[bytes],
    meter: Meter,
    allowed: Callable[[Name], bool],
    check: Check,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The value of one pickle; the stream stands behind it afterwards.

    Args:
        stream: at the start of the pickle.
        meter: of the file.
        allowed: whether a name may occur.
        check: see `Check`.
        persistent: the object of a persistent id; None: there are none.

    Raises `Refused` for a name or an opcode that is not expected, and for a stream that is no whole pickle.
    """
    machine = _Machine(allowed, check, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            meter.work()
            machine.step(opcode.name, argument)
        return machine.result()
    except (Refused, OSError):
        raise
    except Exception as error:  # of a damaged stream: pickletools raises what its parts raise
        raise Refused(f"it is cut short or damaged ({type(error).__name__}: {shown(error)})") from None


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(
        self, allowed: Callable[[Name], bool], check: Check, persistent: Callable[[object], object] | None
    ) -> None:
        self.allowed, self.check, self.persistent = allowed, check, persistent
        self.stack: list[Any] = []
        self.memo: dict[Key, object] = {}
        self.done = False

    def result(self) -> object:
        if not self.done or len(self.stack) != 1 or self.stack[0] is _MARK:
            raise Refused("it does not end with one object")
        return self.stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _SCALARS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[opcode])))
        else:
            match opcode:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    self.done = True
                case "MARK":
                    stack.append(_MARK)
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    self._marked()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[as_key(argument)] = self._top()
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self._top()
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(set())
                case "LIST":
                    stack.append(self._marked())
                case "TUPLE":
                    stack.append(tuple(self._marked()))
                case "DICT":
                    stack.append(_pairs(self._marked()))
                case "FROZENSET":
                    stack.append(frozenset(map(as_key, self._marked())))
                case "APPEND":
                    _extend(stack, self._pop(1))
                case "APPENDS":
                    _extend(stack, self._marked())
                case "ADDITEMS":
                    _add(stack, self._marked())
                case "SETITEM":
                    _update(stack, self._pop(2))
                case "SETITEMS":
                    _update(stack, self._marked())
                case "GLOBAL":
                    self._name(*argument.split(" ", 1))
                case "STACK_GLOBAL":
                    self._name(*self._pop(2))
                case "REDUCE" | "NEWOBJ":
                    self._call(*self._pop(2))
                case "BUILD":
                    self._build(*self._pop(1))
                case "BINPERSID" if self.persistent is not None:
                    stack.append(self.persistent(*self._pop(1)))
                case _:
                    raise Refused(f"it uses {opcode}, which no file of this kind needs")

    def _top(self) -> object:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark is no object")
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if count == 0:
            return []
        if len(self.stack) < count or any(value is _MARK for value in self.stack[-count:]):
            raise ValueError("the stack is too short")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _marked(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                popped = self.stack[place + 1 :]
                del self.stack[place:]
                return popped
        raise ValueError("there is no mark")

    def _name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it names a class by something that is no text")
        found = Name(module, name)
        if not self.allowed(found):
            raise Refused(f"it asks for {shown(str(found))!r}, which is none of what such a file needs")
        self.stack.append(found)

    def _call(self, what: object, arguments: object) -> None:
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            raise Refused("it calls something that is no name")
        self.stack.append(self.check(Built(what, arguments)))

    def _build(self, state: object) -> None:
        target = self._top()
        if not isinstance(target, Built) or target.state is not None:
            raise Refused("it gives a state to something that has none")
        target.state = state


def as_key(value: object) -> Key:
    """Words and small numbers only: a nest of a million tuples would end the process as it is hashed, and numbers that
    were chosen to collide would keep it busy for days."""
    if not isinstance(value, Key) or (isinstance(value, int) and abs(value) > _LARGEST_KEY):
        raise Refused(f"it has a key that no file needs, of type {type(value).__name__}")
    return value


def _pairs(values: Sequence[object]) -> dict[Key, object]:
    return {as_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _update(stack: list[Any], values: Sequence[object]) -> None:
    target = stack[-1].items if isinstance(stack[-1], Built) else stack[-1]
    if not isinstance(target, dict):
        raise Refused("it sets an item of something that has none")
    target.update(_pairs(values))


def _extend(stack: list[Any], values: Iterable[object]) -> None:
    if not isinstance(stack[-1], list):
        raise Refused("it appends to something that is no list")
    stack[-1].extend(values)


def _add(stack: list[Any], values: Iterable[object]) -> None:
    if not isinstance(stack[-1], set):
        raise Refused("it adds to something that is no set")
    stack[-1].update(map(as_key, values))
