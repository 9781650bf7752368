"""A pickle reader that cannot run anything.

Python's own unpickler calls whatever the file names, so that a stranger's checkpoint can run any program. The
reader here interprets the pickle opcodes itself: a name in the file is looked up in an explicit table of our
own constructors, everything else is refused, and state can be set on our own containers only. There is no
attribute access, no import and no call into the file's objects anywhere, and what a file may make us copy is
bounded by its size.
"""

import argparse
import io
import math
import pathlib
import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vrdistill_jax.data.point_tables import printable

MAX_OPCODES = (
    4_000_000  # the largest optimiser states have some 100,000; each costs at most a few hundred bytes
)
COPY_ALLOWANCE = 1 << 26  # bytes that constructors may copy beyond a multiple of the pickle's own size
MAX_ELEMENTS = 1 << 48
SLOT_BYTES = 64  # what one element of a container costs, roughly
_ARGUMENT_BYTES = 16  # what an argument of a call counts for, however small
_LARGEST_KEY_BITS = 256  # hashing a wide integer takes time each time

_PUSHED = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"]
    + ["STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"]
    + ["BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REMEDY = (
    "nothing of the file was executed. If you trust the file, open it where it was made and save only its "
    "weights: torch.save(model.state_dict(), NEW_FILE)"
)


class CheckpointFileError(ValueError):
    """The file is damaged, incomplete or no checkpoint of a known format."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class UnsafeCheckpointError(ValueError):
    """The file asks for code that a checkpoint of weights does not need."""

    def __init__(self, message: str):
        super().__init__(printable(message))

    @classmethod
    def naming(cls, what: str) -> "UnsafeCheckpointError":
        """The error for a class, function or opcode that is not on the list."""
        return cls(
            f"the checkpoint asks for {printable(what, 400)}, which is not on the list of harmless types; {_REMEDY}"
        )


@dataclass(frozen=True, eq=False)
class Constructor:
    """A name of the file bound to one of our functions; to None where it may be mentioned but not called."""

    name: str
    build: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Constant:
    """A name of the file that stands for a plain value."""

    value: Any


class Namespace(dict):
    """An argparse.Namespace as a dictionary of its attributes."""


@dataclass(eq=False)
class NumpyType:
    """A numeric NumPy dtype whose byte order arrives after its construction."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype:
        """The dtype as NumPy has it."""
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


Symbols = Mapping[tuple[str, str], Constructor | Constant]


def read_pickle(
    stream: io.BytesIO, symbols: Symbols, load_persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle from a stream and leaves the stream behind it.

    Args:
      stream: bytes in memory, at the first opcode.
      symbols: what the names in the pickle, as (module, name), stand for; see `base_symbols`.
      load_persistent: resolves persistent ids; None refuses them.

    Returns:
      Dictionaries, lists, tuples, sets, strings, numbers, and what the constructors of `symbols` give.
      Attributes that a pickle sets on an OrderedDict (torch's module versions) are not kept.

    Raises:
      UnsafeCheckpointError: if the pickle names anything that is not in `symbols`.
      CheckpointFileError: if the pickle is damaged, incomplete or too large for what it holds.
    """
    start = stream.tell()
    machine = _Machine(symbols, load_persistent, 4 * (len(stream.getbuffer()) - start) + COPY_ALLOWANCE)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise CheckpointFileError(
                    f"the checkpoint's pickle has more than {MAX_OPCODES} opcodes; it is no set of weights"
                )
            if opcode.name == "STOP":
                stream.seek(start + 1 if position is None else position + 1)
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (CheckpointFileError, UnsafeCheckpointError):
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise CheckpointFileError(
            f"the checkpoint's pickle is damaged or incomplete ({printable(str(error), 300)}); copy or download it again"
        ) from error
    raise CheckpointFileError("the checkpoint's pickle ends without a STOP; copy or download it again")


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, symbols: Symbols, load_persistent, copy_budget: int):
        self.symbols, self.load_persistent, self.copy_budget = symbols, load_persistent, copy_budget
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Interprets one opcode."""
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name in _SMALL_TUPLES:
            self.stack.append(tuple(self._pop(_SMALL_TUPLES[name])))
        elif name not in ("PROTO", "FRAME"):
            self._structure(name, argument)

    def _structure(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._pop_mark()
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "LIST" | "TUPLE" | "FROZENSET" | "DICT":
                items = self._pop_mark()
                make: Any = {"LIST": list, "TUPLE": tuple, "FROZENSET": _frozen_set, "DICT": _dict_of_pairs}[
                    name
                ]
                self.stack.append(make(items))
            case "APPEND" | "APPENDS":
                items = self._pop(1) if name == "APPEND" else self._pop_mark()
                _expect(self.stack[-1], list, "an append").extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_mark()
                _expect(self.stack[-1], dict, "an item").update(_dict_of_pairs(items))
            case "ADDITEMS":
                items = self._pop_mark()
                _expect(self.stack[-1], set, "an addition").update(_frozen_set(items))
            case "GLOBAL":
                stack.append(self._find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._find(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                callee, arguments = self._pop(2)
                self.stack.append(self._call(callee, _expect(arguments, tuple, "a call")))
            case "BUILD":
                (state,) = self._pop(1)
                self._charge(state if isinstance(state, tuple) else (state,))
                _set_state(self.stack[-1], state)
            case "BINPERSID" | "PERSID":
                key = self._pop(1)[0] if name == "BINPERSID" else argument
                if self.load_persistent is None:
                    raise UnsafeCheckpointError.naming("an object outside its pickle")
                self.stack.append(self.load_persistent(key))
            case "INST":
                raise UnsafeCheckpointError.naming(f"the class {argument.replace(' ', '.')}")
            case _:
                raise UnsafeCheckpointError.naming(f"the pickle opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _find(self, module: Any, name: Any = "") -> Any:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a class name is no string")
        symbol = self.symbols.get((module, name))
        if symbol is None:
            raise UnsafeCheckpointError.naming(f"{module}.{name}")
        return symbol.value if isinstance(symbol, Constant) else symbol

    def _call(self, callee: Any, arguments: tuple) -> Any:
        if type(callee) is not Constructor or callee.build is None:
            raise UnsafeCheckpointError.naming(f"a call of {getattr(callee, 'name', type(callee).__name__)}")
        self._charge(arguments)
        return callee.build(*arguments)

    def _charge(self, arguments: tuple) -> None:
        """Counts what a constructor may copy: one remembered list could else be copied a million times."""
        self.copy_budget -= _ARGUMENT_BYTES * len(arguments)
        for argument in arguments:
            if isinstance(argument, (str, bytes, bytearray)):
                self.copy_budget -= len(argument)
            elif isinstance(argument, (list, tuple, dict, set, frozenset)):
                self.copy_budget -= SLOT_BYTES * len(argument)
        if self.copy_budget < 0:
            raise CheckpointFileError(
                "the checkpoint's pickle would take far more memory than the file; it is no set of weights"
            )


def _expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{what} finds a {type(value).__name__}")
    return value


def _label(value: Any) -> str:
    """A value of the file in an error message: short, and never the text of a deep structure."""
    return repr(value[:100]) if isinstance(value, str) else f"<{type(value).__name__}>"


def _key(value: Any) -> Any:
    """A plain key; nested tuples could take exponential time to hash."""
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise TypeError(f"a {type(value).__name__} as a key")
    if type(value) is int and value.bit_length() > _LARGEST_KEY_BITS:
        raise TypeError(f"an integer of {value.bit_length()} bits as a key")
    return value


def _frozen_set(items) -> frozenset:
    return frozenset(_key(item) for item in items)


def _dict_of_pairs(items: list) -> dict:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Namespace):
        target.update({_key(k): v for k, v in _expect(state, dict, "attributes").items()})
    elif type(target) is dict:
        _expect(state, dict, "attributes")
    elif isinstance(target, NumpyType):
        target.order = {"<": "<", ">": ">", "|": "=", "=": "="}[_expect(state, tuple, "a dtype's state")[1]]
    elif isinstance(target, np.ndarray) and target.shape == (0,) and target.base is None:
        _, shape, kind, is_fortran, data = _expect(state, tuple, "an array's state")
        array = _array(data, kind, shape, "F" if is_fortran else "C")
        # In place, because the file may refer to the empty array that it builds first from several places.
        state = (1, array.shape, array.dtype, array.ndim > 1 and bool(is_fortran), array.tobytes("A"))
        target.__setstate__(state)
    else:
        raise UnsafeCheckpointError.naming(f"state to be set on a {type(target).__name__}")


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape from a file: at most 32 non-negative integers whose product is no absurdity."""
    if not isinstance(shape, (tuple, list)) or len(shape) > 32:
        raise CheckpointFileError(
            "the checkpoint holds an array whose shape is no tuple of at most 32 integers"
        )
    if any(type(n) is not int or not 0 <= n < MAX_ELEMENTS for n in shape):
        raise CheckpointFileError("the checkpoint holds an array with a negative or absurd size")
    if math.prod(n for n in shape if n) >= MAX_ELEMENTS:
        raise CheckpointFileError(f"the checkpoint holds an array of the absurd shape {tuple(shape)}")
    return tuple(shape)


def _array(data: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    dtype, shape = _expect(kind, NumpyType, "an array's type").dtype(), checked_shape(shape)
    data = (
        data.encode("latin-1")
        if isinstance(data, str)
        else _expect(data, (bytes, bytearray), "an array's bytes")
    )
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise CheckpointFileError(
            f"a NumPy array of the checkpoint has {len(data)} bytes for the shape {shape} and type {dtype}"
        )
    if dtype.kind == "U" and (np.frombuffer(data, f"{dtype.byteorder}u4") > sys.maxunicode).any():
        raise CheckpointFileError("a NumPy array of text holds numbers that are no characters")
    return np.frombuffer(bytes(data), dtype).reshape(shape, order="F" if order == "F" else "C")


def _numpy_type(code: Any, *_: Any) -> NumpyType:
    if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?(b1|[iuf][1248]|c8|c16)", code):
        raise UnsafeCheckpointError.naming(f"a NumPy array of type {_label(code)} (numbers only)")
    return NumpyType(code.lstrip("<>=|"), code[0] if code[0] in "<>" else "=")


def _numpy_scalar(kind: Any, data: Any) -> Any:
    return _array(data, kind, (), "C")[()]


def _numpy_shell(kind: Any, *_: Any) -> np.ndarray:
    if type(kind) is not Constructor or kind.name != "numpy.ndarray":
        raise UnsafeCheckpointError.naming("a subclass of numpy.ndarray")
    return np.empty(0, np.uint8)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """What protocol 2 writes for bytes; other codecs could expand their input."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafeCheckpointError.naming(f"the codec {_label(encoding)}")
    return _expect(text, str, "an encoding").encode("latin-1")


def _bytearray(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    return bytearray(
        _encode(data, encoding) if isinstance(data, str) else _expect(data, bytes, "a bytearray")
    )


def _set(items: Any = ()) -> set:
    return set(_frozen_set(_expect(items, (list, tuple, set, frozenset), "a set")))


def _ordered(items: Any = ()) -> dict:
    """OrderedDict, dict and Counter: from a dictionary or from a list of pairs."""
    if isinstance(items, dict):
        return dict(items)
    return {_key(key): value for key, value in _expect(items, (list, tuple), "a dictionary")}


def _default_dict(_factory: Any = None, items: Any = ()) -> dict:
    return _ordered(items)


def _namespace(*arguments: Any) -> Namespace:
    if arguments:
        raise TypeError("argparse.Namespace with positional arguments")
    return Namespace()


def _path(*parts: Any) -> str:
    return str(pathlib.PurePosixPath(*[_expect(part, str, "a path") for part in parts]))


def _list(items: Any = ()) -> list:
    return list(_expect(items, (list, tuple), "a list"))


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    return complex(_expect(real, float, "a complex number"), _expect(imaginary, float, "a complex number"))


def base_symbols() -> dict[tuple[str, str], Constructor | Constant]:
    """The harmless names of Python and NumPy: containers, argparse.Namespace, numbers and numeric arrays."""
    table: dict[tuple[str, str], Constructor | Constant] = {}

    def add(modules: str, name: str, build: Callable[..., Any] | None) -> None:
        for module in modules.split():
            table[module, name] = Constructor(f"{module}.{name}", build)

    containers: dict[str, Callable[..., Any]] = {
        "set": _set,
        "frozenset": lambda items=(): frozenset(_set(items)),
        "list": _list,
        "tuple": lambda items=(): tuple(_list(items)),
        "dict": _ordered,
        "bytes": lambda: b"",  # protocol 2 writes other bytes through _codecs.encode
        "bytearray": _bytearray,
        "complex": _complex,
    }
    for name, build in containers.items():
        add("builtins __builtin__", name, build)
    for name in (
        "int",
        "float",
        "bool",
        "str",
    ):  # mentioned as a default factory or a type option, never called
        add("builtins __builtin__", name, None)
    add("collections", "OrderedDict", _ordered)
    add("collections", "Counter", _ordered)
    add("collections", "defaultdict", _default_dict)
    add(argparse.__name__, "Namespace", _namespace)
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        add("pathlib pathlib._local", name, _path)
    add("_codecs", "encode", _encode)
    add("numpy", "ndarray", None)
    add("numpy", "dtype", _numpy_type)
    add("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", _numpy_shell)
    add("numpy.core.multiarray numpy._core.multiarray", "scalar", _numpy_scalar)
    add("numpy.core.numeric numpy._core.numeric", "_frombuffer", _array)
    return table
