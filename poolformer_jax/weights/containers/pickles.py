"""An unpickler for PyTorch files that builds data and runs no code from the file.

Python's own unpickler imports and calls whatever a file names. This one interprets the opcodes that `torch.save`
writes, and calls only the constructors in `pickle_names`; objects of any other class become `Inert`. Memory is bounded:
sizes that a file claims are checked before they are read. The opcodes' arguments are decoded by the standard library's
`pickletools`, whose documentation describes the language.
"""

import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from poolformer_jax.weights.containers.pickle_names import Global, Inert, PickledArray, PickledDtype, look_up
from poolformer_jax.weights.containers.storage import BoundedReader, Storage, StoredTensor, WeightsFileError

MAX_INSTRUCTIONS = 1_000_000  # m48 with AdamW's state and a moving average has some 80,000
_LONGEST_NAME = 300  # a pickle can join two long texts a million times
_LARGEST_KEY = 1 << 60  # beyond it, integers can be chosen to collide in a dict

_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": Inert,
}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STRINGS = ("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_ARGUMENTS = frozenset(_NUMBERS + _STRINGS + _BYTES)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME"})
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, EOFError)


def load(stream: BoundedReader, path: Path, storage: Callable[[tuple[Any, ...]], Storage]) -> Any:
    """Reads one pickle from `stream`, up to the byte after it.

    Args:
        stream: the file, at the pickle's first byte.
        path: the file's path, which NumPy arrays in the pickle keep for messages.
        storage: called with every persistent id, PyTorch's reference to numbers outside the pickle.

    Returns:
        Dicts, lists, tuples, strings and numbers; tensors and NumPy arrays as `StoredTensor`; everything else as
        `Inert`.

    Raises:
        WeightsFileError: if the pickle is damaged.
    """
    machine = _Machine(storage)
    try:
        for _ in range(MAX_INSTRUCTIONS):
            opcode, argument = _next_opcode(stream)
            if opcode == "STOP":
                return _with_arrays(machine.pop(), path)
            machine.step(opcode, argument)
    except WeightsFileError:
        raise
    except _DAMAGE as error:
        raise WeightsFileError(f"its pickle is damaged ({error})") from error
    raise WeightsFileError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions, too many for a state dict")


def _next_opcode(stream: BoundedReader) -> tuple[str, Any]:
    code = stream.read(1)
    if not code:
        raise WeightsFileError("its pickle ends before its last instruction: the file is truncated")
    opcode = _OPCODES.get(code)
    if opcode is None or opcode.name not in _HANDLED:
        name = opcode.name if opcode else f"{code[0]:#04x}"
        raise WeightsFileError(f"its pickle uses the instruction {name}, which torch.save does not write")
    if opcode.name == "GLOBAL":  # pickletools would undo escapes in a name; the unpickler does not
        return "GLOBAL", f"{_line(stream)}.{_line(stream)}"
    return opcode.name, opcode.arg.reader(stream) if opcode.arg else None  # type: ignore[arg-type]


def _line(stream: BoundedReader) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise WeightsFileError("its pickle ends within a name: the file is truncated")
    return line[:-1].decode("ascii")


class _Machine:
    """The stack, its marks and the memo; one method per family of instructions."""

    def __init__(self, storage: Callable[[tuple[Any, ...]], Storage]) -> None:
        self._storage = storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one instruction."""
        if opcode in _ARGUMENTS:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self._stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._take(_TUPLES[opcode])))
        elif opcode not in _IGNORED:
            _STEPS[opcode](self, argument)

    def pop(self) -> Any:
        """Removes and returns the top value; values below a mark cannot be removed."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("nothing on the stack")
        return self._stack.pop()

    def _take(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def _take_marked(self) -> list[Any]:
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _drop(self, _: Any) -> None:
        self.pop()

    def _drop_marked(self, _: Any) -> None:
        self._take_marked()

    def _repeat(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._take_marked()))

    def _list(self, _: Any) -> None:
        self._stack.append(self._take_marked())

    def _dict(self, _: Any) -> None:
        items = self._take_marked()
        self._stack.append({})
        self._set_items(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Inert):
            raise TypeError(f"appends to a {type(target).__name__}")

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _append_marked(self, _: Any) -> None:
        self._extend(self._take_marked())

    def _frozenset(self, _: Any) -> None:
        self._take_marked()
        self._stack.append(Inert())

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2 or not isinstance(target, dict | Inert):
            raise TypeError(f"sets items of a {type(target).__name__}")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2]):
                _set_item(target, key, value)

    def _set_one(self, _: Any) -> None:
        self._set_items(self._take(2))

    def _set_marked(self, _: Any) -> None:
        self._set_items(self._take_marked())

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _global(self, name: str) -> None:
        self._stack.append(look_up(name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= _LONGEST_NAME):
            raise TypeError("a name is not a short text")
        self._stack.append(look_up(f"{module}.{name}"))

    def _call(self, _: Any) -> None:
        function, arguments = self._take(2)
        if isinstance(function, Inert):  # such as a member of an enum, which a pickle gets with getattr
            self._stack.append(function)
        elif isinstance(function, Global) and isinstance(arguments, tuple):
            self._stack.append(function.construct(*arguments))
        else:
            raise TypeError(f"calls a {type(function).__name__}")

    def _create_with_keywords(self, _: Any) -> None:
        function, _, _ = self._take(3)
        if not isinstance(function, Global | Inert):
            raise TypeError(f"calls a {type(function).__name__}")
        self._stack.append(Inert(function.name))

    def _build(self, _: Any) -> None:
        # Sets attributes of an object (a state dict's `_metadata`, a namespace's fields). Only NumPy's are of weights.
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, PickledArray | PickledDtype):
            target.set_state(state)
        elif not isinstance(target, dict | Inert | StoredTensor):
            raise TypeError(f"sets attributes of a {type(target).__name__}")

    def _persistent(self, _: Any) -> None:
        reference = self.pop()
        if not isinstance(reference, tuple):
            raise TypeError("a storage reference is not a tuple")
        self._stack.append(self._storage(reference))


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._drop,
    "POP_MARK": _Machine._drop_marked,
    "DUP": _Machine._repeat,
    "TUPLE": _Machine._tuple,
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._append_marked,
    "ADDITEMS": _Machine._append_marked,
    "FROZENSET": _Machine._frozenset,
    "SETITEM": _Machine._set_one,
    "SETITEMS": _Machine._set_marked,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "NEWOBJ_EX": _Machine._create_with_keywords,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_HANDLED = _ARGUMENTS | _CONSTANTS.keys() | _EMPTY.keys() | _TUPLES.keys() | _IGNORED | _STEPS.keys() | {"STOP"}


def _set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing a nested tuple recurses as deep as the file chooses. Keys of weights are names and numbers.
    if not isinstance(key, str | int | float | bytes | None) or (isinstance(key, int) and abs(key) > _LARGEST_KEY):
        key = Inert()
    target[key] = value


_DEPTH_OF_WEIGHTS = 4  # dicts around the weights: a checkpoint, its entry, ...


def _with_arrays(value: Any, path: Path) -> Any:
    """Replaces the NumPy arrays in `value`, and in dicts nested in it, by tensors. Changes dicts in place."""
    top = {"": value}
    level, seen = [top], set[int]()
    for _ in range(_DEPTH_OF_WEIGHTS):
        # A hostile pickle can place one dict in a million others.
        level = [one for one in level if id(one) not in seen and not seen.add(id(one))]  # type: ignore[func-returns-value]
        for one in level:
            for key, entry in one.items():
                if isinstance(entry, PickledArray):
                    one[key] = entry.tensor(path) or Inert("numpy.ndarray")
        level = [entry for one in level for entry in one.values() if isinstance(entry, dict)]
    return top[""]
