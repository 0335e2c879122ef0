"""What a system hands to the rooms, and which room asks for it: types and words, no work.

The rooms (data, training, recognition, averaging, the commands) know these types and no system. A
member that a system has no use for has a neutral value (an empty mapping, a function that returns
nothing); no room asks whether a member is there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Variables = Mapping[str, Any]  # {"params": nested dict, "batch_stats": nested dict}
# {name: array [B, ...]}: rows first in every leaf; "index" i64[B], -1 pads
Batch = Mapping[str, Any]
Bucket = tuple[int, ...]  # (rows of all processes, *one size for each of Layout.axes)


class Piece(NamedTuple):
    """A stretch of a recording, or of a file of codes."""

    source: Any  # path, open file, or array in memory
    byte_start: int = -1  # inside a tar; -1: a file of its own
    byte_size: int = -1
    start: float = -1.0  # s; -1: the whole file
    seconds: float = -1.0  # -1: not told, the index reads the header
    channel: int = -1  # -1: the mean of all


class Item(NamedTuple):
    """One example: what a line of a source says, or what a caller gives in memory."""

    id: str
    pieces: tuple[Piece, ...]
    fields: Mapping[str, Any]  # the line's own: {"text": ...}, {"conversations": [...]} ...


class Layout(Protocol):
    """How items become batches of fixed shapes."""

    axes: tuple[str, ...]  # ("samples", "tokens"): the first one's edges are fitted  [data.plan]

    def items(self, line: Mapping) -> Iterable[Item]:
        """The items of one line of a source; DataError says why there are none.  [data.index]"""

    draws: bool  # whether `fill` depends on its words: then each epoch has draws of its own

    def sizes(self, item: Item, scored: bool) -> tuple[float, ...]:
        """A number for each axis, from which `drawn` tells its size: seconds, tokens.  [data.index]

        The pieces' seconds are as the list says, -1 where it does not; where the file says
        otherwise it is asked again. DataError: not usable; its LengthError: not with these seconds.
        scored: the item is validated or evaluated: limits do not apply, and a text that cannot be
        encoded keeps its row.
        """

    def for_set(self, seconds: float, exact: bool) -> "Layout":
        """The layout for a set of recordings of so many seconds together, which may keep them in
        memory. exact: its pieces' seconds were read from the files.  [data]"""

    def drawn(self, sizes, words):
        """(i64[M,n], i64[M,n]): upper bounds of `sizes` f64[M,n] on every axis under the draws
        `words`, and what an item adds where another stands before it in its row.  [data.plan]

        words: u64[M,2] random numbers of an item in an epoch: the first draws what changes its
        size (0: nothing is drawn), the second what it adds. None: the largest that can be drawn.
        """

    def cost(self, sizes):
        """f64[...] of sizes i64[...,n]: what a row costs; rows = budget // cost.  [data.buckets]"""

    def label(self, bucket: Bucket) -> str:
        """ "8 x 7.00 s, 96 tokens"  [logs]"""

    def empty(self, bucket: Bucket) -> Batch:
        """A batch of padding rows, numpy.  [data.batches, training.loop, commands]"""

    def fill(self, batch: Batch, row: int, items: Sequence[Item], words) -> None:
        """Writes items into an empty row (but not its "index"), reading their pieces; u64[m,2]
        words as in `drawn`. data.config.ItemError names the item that cannot be read.
        [data.batches, commands]"""


@dataclasses.dataclass(frozen=True)
class Validator:
    """One measurement of a set: a row's result depends on that row and its key alone."""

    metrics: tuple[str, ...]  # ("wer", "cer"): what config.checkpoint.metric may rank by
    run: Callable  # (variables, batch, key) -> {name: [B, ...]}, to be jitted; row r may fold in
    # index[r] for what it draws  [training.validation, evaluate]
    score: Callable  # ({index: {name: row}}, {index: Item}) -> ({metric: float}, sentences to show)


@dataclasses.dataclass(frozen=True)
class WindowDecoder:
    """Audio of any length to text: recognition cuts it into windows and joins their tokens."""

    sample_rate: int
    frame: int  # samples between output frames: windows begin at multiples
    tokenizer: Any
    decode: Callable  # (variables, {"audio" f32[B,S], "audio_len" i32[B]}) -> {"tokens",
    # "start_frame", "end_frame" i32[B,L] (-1: time unknown), "token_len" i32[B], "heard" i32[B]
    # frames that were decoded, and what `columns` and `totals` name}, to be jitted
    prepare: Callable  # variables -> variables: adds what follows from weights alone, once
    window: Callable  # (meta, s of the longest row trained on or 0) -> s seen at once
    text: Callable  # ids -> str
    marks: frozenset = frozenset()  # words that stand without a space after the word before
    columns: tuple[str, ...] = ()  # further i32[B,L] of `decode`, in frames, one for each token
    totals: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further i32[B] of
    # `decode` that are summed over a recording, and what a mean of them is called
    extras: Mapping[str, Callable] = dataclasses.field(default_factory=dict)  # by --timestamps:
    # (tokens, start_frame, end_frame, *columns, meta) of the joined recording -> JSON


@dataclasses.dataclass(frozen=True)
class Stepper:
    """Something that goes on: a decoder LM, a live recogniser, a speech dialogue.

    The state is a pytree of static shapes, [B, ...] in every leaf; rows begin and end on their own.
    """

    inputs: Mapping[str, tuple]  # {"audio": (1920,), "temperature": ()}: shape of a row's input
    start: Callable  # (variables, batch) -> (state, outputs): empty caches or a prompt's; jitted
    step: Callable  # (variables, state, inputs, keys [B]: one a row) -> (state, outputs), jitted,
    # state donated; inputs also has "fresh" bool[B] (begin anew) and "last" bool[B] (flush)
    emit: Callable  # outputs of a row, [steps, ...] on the host -> text, words or samples


class Task(Protocol):
    """A frozen dataclass that one config and tokenizer make; see System.task."""

    tokenizer: Any
    layout: Layout
    sharding: Sequence[tuple[str, tuple]]  # (regex, mesh axis or None per dimension)  [sharding]
    token_parameters: str  # regex of what a vocabulary gives its meaning to  [training.start]
    validators: Mapping[str, Validator]  # by name; config.train.validate picks  [training]
    verbs: Mapping[str, WindowDecoder | Stepper]  # "transcribe", "generate", "stream"  [commands]
    heads: tuple  # (heads, durations) that `text.vocab.expand` can widen; ((), ()): none

    def check(self, buckets: Sequence[Bucket]) -> None:
        """Raises ValueError where training would be vain, before anything compiles."""

    def init(self, key, batch: Batch) -> Variables:
        """Fresh variables, each leaf in the dtype it is kept in."""

    def divisors(self, batch: Batch) -> Mapping[str, Any]:
        """{name: f32[]} of the whole global batch, from its data alone.  [training.step]"""

    def loss(self, variables, batch, divisors, keys, step):
        """(f32[], (batch_stats, {name: f32[] sum})) of a micro-batch, divided already: the values
        of the micro-batches add up to the batch's. keys: {"augment": one a step, "dropout": one a
        micro-batch}.  [training.step]"""

    def line(self, sums: Mapping[str, float], seconds: float) -> Mapping[str, float]:
        """Its own columns of the training log, from the sums of an interval of so many seconds."""


@dataclasses.dataclass(frozen=True)
class Original:
    """One foreign format. Nothing of a file is ever run."""

    name: str  # "nemo", "hf": convert --to
    endings: tuple[str, ...]  # of names that mean it, (".nemo",); the first one is given to exports
    files: Callable  # (path, like) -> the files that hold its weights; () = another format. `path`
    # may be the only one of them. like: "" or the path of what config and tokenizer are taken from
    meta: Callable  # (path, like, with_tokens) -> a step's meta: {"config", "tokenizer", ...}, with
    # what `write` wants back
    leaves: Callable  # (path, like) -> {"params/..." or "batch_stats/...": array-like with shape,
    # dtype and slices, mapped from the file where it can be}
    write: Callable  # (path, meta, leaves, options) -> [what was written, sentences on what was
    # changed]; raises ValueError, by name, for what the format does not have


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a system's model that an origin may give."""

    prefix: str  # of its parameters' paths; "" = all
    section: str  # its settings: "model", "model.encoder"
    sources: Mapping[str, tuple[str, str]]  # {system it may come from: (prefix, section) there}


@dataclasses.dataclass(frozen=True)
class Flag:
    """An option of a command, declared once."""

    help: str
    choices: tuple = ()
    parse: Callable = str  # what stands on the command line -> value; ValueError
    switch: bool = False  # it takes no value


@dataclasses.dataclass(frozen=True)
class Options:
    """What a system lets a command change: most options are a change of the config."""

    flags: Mapping[str, Flag]
    changes: Callable  # (config, {name: value}) -> {"decoding.beam": value}; ValueError


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the catalogue.

    "package.module:name" is imported when somebody asks for it, so that commands show their help
    without JAX.
    """

    name: str
    old_names: tuple[str, ...]  # read in checkpoints and users' configs
    sections: Mapping[str, str]  # config section -> "module:SettingsDataclass"
    task: str  # "module:function": (config, tokenizer, ways: parts rows are split into) -> Task
    originals: Mapping[str, str]  # {"nemo": "module:Original"}, the formats that it comes from
    parts: Mapping[str, Part]  # what origins may give by name, beside the whole model
    options: Mapping[str, Options]  # by verb, "transcribe" ...: what a command may change; those of
    # "convert" reach Original.write
    recipe: Callable  # mapping of a foreign YAML -> ({"optim.lr": value} changes of the default
    # config, notes to print); None: not one of its toolkit's; ValueError names keys
