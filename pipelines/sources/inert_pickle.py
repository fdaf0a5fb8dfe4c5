"""CIFAR's Python batches are pickles. They are never unpickled: this reads the few opcodes they need.

A pickle is a program that may import and call anything. Here an opcode does nothing but move plain values
about: what it names is compared with a fixed list and stays a name, and every other opcode or name is
refused. The pixels are not even copied: their place in the file is what is wanted.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import Any

from workers.errors import DataError

NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
}
"""All that a batch may name; nothing of it is ever imported."""
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "INT"}
TEXTS = {"SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MAX_OPCODES = 5_000_000
"""CIFAR-100's training batch has 400,000."""


@dataclass(frozen=True)
class Name:
    what: str


@dataclass
class Array:
    """An array of unsigned bytes, in C order, whose data lies at `offset` of the pickle."""

    shape: tuple[int, ...] = ()
    offset: int = -1


@dataclass
class Type:
    code: str


@dataclass(frozen=True)
class Text:
    """A string or bytes, with the place of its last byte's end in the pickle."""

    value: str
    end: int


MARK = object()


class InertMachine:
    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> dict[str, Any]:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream := io.BytesIO(data))):
                if count > MAX_OPCODES:
                    raise DataError(f"{self._where}: more than {MAX_OPCODES:,} opcodes; no batch of CIFAR")
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument, stream.tell())
            result = self._stack.pop()
        except (ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
            raise DataError(f"{self._where}: damaged, or no batch of CIFAR ({error})") from None
        if not isinstance(result, dict):
            raise DataError(f"{self._where}: holds no dictionary; no batch of CIFAR")
        return result

    def _step(self, name: str, argument: Any, end: int) -> None:
        stack = self._stack
        if name in NUMBERS:
            stack.append(argument)
        elif name in TEXTS:
            text = argument if isinstance(argument, str) else argument.decode("latin-1")
            stack.append(Text(text, end))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            if argument not in NAMES:
                raise DataError(
                    f"{self._where}: names {argument.replace(' ', '.')!r}; refused, nothing was run"
                )
            stack.append(Name(NAMES[argument]))
        elif name not in ("PROTO", "FRAME"):
            self._build(name)

    def _build(self, name: str) -> None:
        stack = self._stack
        if name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = self._since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][_plain(key)] = value
        elif name == "SETITEMS":
            items = self._since_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][_plain(key)] = value
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[5:] or 0)
            items = [stack.pop() for _ in range(count)][::-1] if count else self._since_mark()
            stack.append(tuple(items))
        elif name == "REDUCE":
            arguments, what = stack.pop(), stack.pop()
            stack.append(self._made(what, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._set_state(stack[-1], state)
        else:
            raise DataError(f"{self._where}: the pickle opcode {name}, which no batch of CIFAR has; refused")

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1 - stack[::-1].index(MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _made(self, what: Any, arguments: Any) -> Array | Type:
        if what == Name("reconstruct") and arguments[0] == Name("ndarray"):
            return Array()
        if what == Name("dtype"):
            return Type(_plain(arguments[0]))
        raise DataError(f"{self._where}: calls something; refused, nothing was run")

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, Type):
            return
        if not isinstance(target, Array):
            raise DataError(f"{self._where}: sets the state of something; refused, nothing was run")
        _, shape, kind, fortran, data = state
        size = 1
        for side in shape:
            size *= side
        if not isinstance(kind, Type) or kind.code != "u1" or fortran or len(data.value) != size:
            raise DataError(f"{self._where}: its array is not one of unsigned bytes in C order")
        target.shape, target.offset = tuple(shape), data.end - size


def read_batch(where: str, data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle: strings, whole numbers, lists of them, and Arrays."""
    values = InertMachine(where).run(data)
    return {str(key): _unwrap(value) for key, value in values.items()}


def _unwrap(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Text) else value
