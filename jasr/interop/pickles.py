"""Reading a pickle as data: its opcodes are interpreted here and nothing that it names is ever
imported, called or given attributes.

Python's unpickler with a restricted `find_class` still calls what it finds and writes attributes
on it (torch's own weights_only was bypassed twice: CVE-2025-32434, CVE-2026-24747). This reader has
only the opcodes that data needs; a call in the pickle runs one of the functions that the reader's
caller gave, becomes an inert `Opaque`, or is refused by name.
"""

import collections
import dataclasses
import io
import pickletools
import typing

LARGEST = 64 << 20  # bytes; the pickle of a 7 B parameter checkpoint is below one MiB


class PickleError(ValueError):
    """The pickle is damaged, or asks for something that reading data does not need."""


class Global(typing.NamedTuple):
    """A name that the pickle refers to; never looked up."""

    name: str


@dataclasses.dataclass
class Opaque:
    """An object of a class that is not loaded: what would have been given to it."""

    name: str
    args: tuple = ()
    state: object = None
    items: list = dataclasses.field(default_factory=list)


_MARK = object()
_PUSH = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SCALAR = (str, bytes, int, float, bool, type(None), Global)


def loads(data, *, functions=None, values=None, opaque=(), persistent=None):
    """The object that the pickle describes, of dict, list, tuple, set, scalars, `Global`, `Opaque`
    and what `functions` return.

    Args:
      data: the pickle, bytes of at most 64 MiB.
      functions: {"module.name": function}, which the pickle may call.
      values: {"module.name": object}, which the pickle may refer to.
      opaque: module names or "module.name"s whose objects are read as `Opaque`.
      persistent: function of a persistent id.

    Raises:
      PickleError: with the name of the global or the opcode that is refused, or the damage.
    """
    if len(data) > LARGEST:
        raise PickleError(f"the pickle has {len(data)} bytes, more than the {LARGEST} allowed")
    machine = _Machine(functions or {}, values or {}, tuple(opaque), persistent)
    try:
        for opcode, arg, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as e:
        raise PickleError(f"damaged pickle: {type(e).__name__}: {e}") from e
    raise PickleError("damaged pickle: no STOP")


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(self, functions, values, opaque, persistent):
        self.functions, self.values, self.opaque = functions, values, opaque
        self.persistent = persistent
        self.stack, self.memo = [], {}

    def step(self, op, arg):
        pop, push = self.pop, self.stack.append
        match op:
            case "PROTO" | "FRAME":
                pass
            case op if op in _PUSH:
                push(arg)
            case op if op in _CONSTANT:
                push(_CONSTANT[op])
            case op if op in _EMPTY:
                push(_EMPTY[op]())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[arg])
            case "MARK":
                push(_MARK)
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                push(self.stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(op[-1]))][::-1]))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "LIST":
                push(self.pop_to_mark())
            case "FROZENSET":
                push(frozenset(map(key, self.pop_to_mark())))
            case "DICT":
                values = self.pop_to_mark()
                push({})
                self.set_items(values)
            case "APPEND":
                self.extend([pop()])
            case "APPENDS":
                self.extend(self.pop_to_mark())
            case "ADDITEMS":
                values = self.pop_to_mark()
                self.target(set).update(map(key, values))
            case "SETITEM":
                value = pop()
                self.set_items([pop(), value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL":
                push(self.named(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                if type(name) is not str or type(module) is not str:  # tuples may print for ever
                    raise PickleError("damaged pickle: a global whose name is no text")
                push(self.named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                args = pop()
                push(self.called(pop(), args))
            case "NEWOBJ_EX":
                keywords, args = pop(), pop()
                push(self.called(pop(), (*args, keywords) if keywords else args))
            case "BUILD":
                state = pop()
                target = self.stack[-1]
                if isinstance(target, Opaque):
                    target.state = state
                elif not isinstance(target, collections.OrderedDict):  # a state dict's _metadata
                    what = type(target).__name__
                    raise PickleError(f"refused: the pickle sets attributes of a {what}")
            case "BINPERSID":
                if self.persistent is None:
                    raise PickleError("refused: the pickle refers to data outside itself")
                push(self.persistent(pop()))
            case _:
                raise PickleError(f"refused: the pickle uses opcode {op}, which data does not need")

    def pop(self):
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("damaged pickle: a mark where an object should be")
        return value

    def pop_to_mark(self):
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # a negative index ends in an IndexError
            at -= 1
            if at < 0:
                raise PickleError("damaged pickle: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def target(self, *types):
        target = self.stack[-1]
        if not isinstance(target, types):
            raise PickleError(f"damaged pickle: a {type(target).__name__} cannot take items")
        return target

    def extend(self, values):
        target = self.target(list, Opaque)
        (target.items if isinstance(target, Opaque) else target).extend(values)

    def set_items(self, values):
        if len(values) % 2:
            raise PickleError("damaged pickle: a key without a value")
        target = self.target(dict, Opaque)
        items = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, Opaque):
            target.items.extend(items)
        else:
            target.update((key(name), value) for name, value in items)

    def named(self, name):
        """What the pickle gets for a name."""
        if name in self.values:
            return self.values[name]
        if name in self.functions or any(f"{name}.".startswith(f"{o}.") for o in self.opaque):
            return Global(name)
        raise PickleError(
            f"refused: the pickle asks for {name!r}, which weights do not need. Nothing of it "
            "was run. If it is only the class of a hyper-parameter, name it (or its module) in "
            "`opaque`, and it is read as inert data"
        )

    def called(self, function, args):
        """What a call in the pickle returns: of one of `functions`, or an object that is inert."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise PickleError("damaged pickle: a call of something that is not a name")
        if function.name in self.functions:
            return self.functions[function.name](*args)
        return Opaque(function.name, args)


def key(value):
    """The value, if it may be a dict key or a set's item: a scalar or a tuple of scalars.

    Hashing a tuple of tuples of tuples ... recurses in C without a limit.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(p, _SCALAR) for p in parts):
        raise PickleError(f"damaged pickle: a {type(value).__name__} as a key")
    return value
