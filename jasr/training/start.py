"""What a run starts from: its tokenizer, and its own checkpoint, given weights or scratch."""

import contextlib
import re

import jax
import numpy as np

from jasr import checkpoint, settings, text, tree
from jasr.data import plan
from jasr.systems import compatibility, source

ITEMS = ("params", "batch_stats", "opt_state", "ema")
COUNTERS = ("step", "bad_steps", "bad_in_row", "rng")


@settings.section
class InitConfig:
    """Weights that a new run starts from, and what it does not train."""

    path: str = ""  # a run, step, average, or an original LaCT checkpoint; "" = scratch
    # "" = the moving average if there is one
    item: str = settings.field("", choices=("", "params", "ema"))
    drop: tuple = ()  # regexes of parameters that are not taken from `path`, e.g. "ctc_head/.*"
    freeze: tuple = ()  # regexes of parameters that get no gradient; the batch statistics of
    # modules that are frozen whole stay too, but training still normalises by each batch
    allow_changes: tuple = ()  # settings that differ from those of `path` on purpose, e.g.
    # "model.lact_mode"; an error about such a difference names them


SCRATCH = InitConfig()


@settings.section
class TextConfig:
    """Which tokenizer a run uses."""

    # "init": the one of config.init.path
    kind: str = settings.field("char", choices=("char", "sentencepiece", "init"))
    vocabulary: tuple = ()  # char: the characters without the blank; () = the training texts'
    path: str = ""  # sentencepiece: the .model file
    normalisation: str = settings.field("lower", choices=text.NORMALISATIONS)


def make_tokenizer(config, texts, given=SCRATCH, own=None):
    """The run's tokenizer.

    Args:
      config: TextConfig.
      texts: function that returns the training texts; called only if the vocabulary is theirs.
      given: InitConfig. own: directory of the run's own checkpoints. For kind "init": what the
        run saved counts first, so that it resumes when the weights it began with are gone.

    Raises:
      ValueError: "init" without a path; text.TextError: a vocabulary or model
        that cannot be used.
    """
    if config.kind == "sentencepiece":
        return text.SentencePieceTokenizer.from_file(config.path, config.normalisation)
    if config.kind == "init":
        if own:
            with contextlib.suppress(checkpoint.CheckpointError):  # none yet
                return text.from_dict(checkpoint.load_meta(own)["tokenizer"])
        if not given.path:
            raise ValueError("config.text.kind 'init' is the tokenizer of config.init.path: set it")
        meta = source.load_meta(source.resolve(given.path, given.item))
        return text.from_dict(meta["tokenizer"])
    if config.vocabulary:
        return text.CharTokenizer((text.BLANK, *config.vocabulary), config.normalisation)
    return text.CharTokenizer.from_texts(texts(), config.normalisation)


class StartError(ValueError):
    """A run cannot start or go on as asked."""


def frozen_paths(params, patterns):
    """The set of parameter paths that one of the regexes matches.

    Raises:
      tree.TreeError: a regex that matches nothing; StartError: nothing is left to train.
    """
    paths = list(tree.flatten(params))
    found = tree.match(
        [(p, True) for p in patterns], paths, what="config.init.freeze rule", optional=True
    )
    if len(found) == len(paths):
        raise StartError("config.init.freeze freezes every parameter: nothing is left to train")
    return set(found)


def to_items(state, save_frozen):
    """The checkpoint items of a TrainState (or of its shapes)."""
    items = {name: getattr(state, name) for name in ITEMS}
    items["counters"] = {name: getattr(state, name) for name in COUNTERS}
    if save_frozen:
        items["frozen"] = state.frozen
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def with_shardings(shapes, shardings):
    """ShapeDtypeStructs that say where each leaf of a state belongs."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def from_items(shapes, items, frozen):
    """The TrainState of restored items; `frozen` are the parameters that were not saved."""
    given = {name: items.get(name, getattr(shapes, name)) for name in ITEMS}
    return shapes.replace(**given, **items["counters"], frozen=items.get("frozen", frozen))


def read_given(origin, config, shapes):
    """Flat {path: numpy} parameters and batch statistics of `origin`, checked.

    Args:
      origin: what `source.resolve` made of config.path.

    Raises:
      tree.TreeError: names or shapes differ from the model's (lists every one); a drop rule that
        matches nothing.
    """
    params, stats = source.read(origin)
    wanted = tree.flatten(shapes["params"])
    dropped = tree.match(
        [(p, True) for p in config.drop], wanted, what="config.init.drop rule", optional=True
    )
    keep = {p: v for p, v in tree.flatten(params).items() if not _dropped(p, config.drop)}
    want = {p: v for p, v in wanted.items() if p not in dropped}
    tree.compare(want, keep, what=f"config.init.path {origin['path']}")
    if jax.tree.leaves(shapes["batch_stats"]):
        tree.compare(shapes["batch_stats"], stats, what=f"batch statistics of {origin['path']}")
    return keep, stats


def check_source(origin, given, task, paths, config):
    """Raises StartError if given weights would mean something else in this run.

    Equal shapes say little: a vocabulary in another order, another front end or another base of
    the rotary positions fit as well. Lists what differs and is not in `given.allow_changes`.

    Args:
      origin: what `source.resolve` made of given.path.
      given: InitConfig.
      paths: of all parameters of the task's model.
      config: the run's, as a plain mapping.
    """
    taken = [p for p in paths if not _dropped(p, given.drop)]
    tokens = any(re.fullmatch(task.TOKEN_PARAMETERS, p) for p in taken)
    meta = source.load_meta(origin, tokens)
    changes = compatibility.differences(meta["config"], config)
    if tokens:
        old, new = meta["tokenizer"], task.tokenizer.to_dict()
        changes |= {
            f"tokenizer.{k}": (old.get(k), new.get(k))
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k)
        }
    changes = {k: v for k, v in changes.items() if k not in given.allow_changes}
    if changes:
        raise StartError(
            f"{origin['path']} was trained otherwise: {compatibility.listed(changes)}. "
            "Take its values (another tokenizer: its config.text, or leave the head out with "
            "config.init.drop); "
            f'if the change is meant: --config.init.allow_changes="{tuple(changes)}"'
        )


def _dropped(path, patterns):
    return any(re.fullmatch(p, path) for p in patterns)


def with_given(state, origin, config, shapes, shardings):
    """A fresh state with the weights of config.init.path in it."""
    given, stats = read_given(origin, config, shapes)
    _check_frozen(origin, tree.flatten(state.frozen), given)

    def fill(current, where):
        flat, places = tree.flatten(current), tree.flatten(where)
        return tree.unflatten(
            {p: put(given[p], x, places[p]) if p in given else x for p, x in flat.items()}
        )

    return state.replace(
        params=fill(state.params, shardings.params),
        frozen=fill(state.frozen, shardings.frozen),
        ema=fill(state.ema, shardings.ema) if state.ema else state.ema,
        batch_stats=jax.tree.map(put, stats, state.batch_stats, shardings.batch_stats),
    )


def put(value, like, sharding):
    """A host array as a global array of `like`'s dtype, each process giving the parts it holds."""
    value = np.asarray(value).astype(like.dtype)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def read_frozen(origin, config, shapes, shardings, frozen):
    """The frozen parameters of a resumed run that does not save them (they were imported)."""
    given, _ = read_given(origin, config, shapes)
    _check_frozen(origin, frozen, given)
    flat, places = tree.flatten(shapes["params"]), tree.flatten(shardings.frozen)
    return tree.unflatten({p: put(given[p], flat[p], places[p]) for p in flat if p in frozen})


def _check_frozen(origin, frozen, given):
    missing = sorted(set(frozen) - given.keys())
    if missing:
        raise StartError(
            f"frozen parameters are not taken from {origin['path']}: {', '.join(missing)}; they "
            "would stay as drawn and would not be saved"
        )


def plan_version(directory):
    """The version of the rules by which a run's data was planned first: an earlier start's, found
    in its checkpoints, else the newest."""
    try:
        meta = checkpoint.load_meta(directory)
    except checkpoint.CheckpointError:  # none yet
        return plan.VERSION
    return meta["plan"]["version"] if "plan" in meta else 2


def check_resume(meta, train_data, tokenizer, config, allow_data_change):
    """Raises StartError if a checkpoint's data or model are not this config's.

    A position in the data means something only for the same index, batch plan and seed.
    """
    if "plan" in meta:
        changes = plan.changes(meta["plan"], train_data.facts())
    else:  # saved before plans were named by their facts
        changes = meta["fingerprint"] != train_data.fingerprint
    if changes and not allow_data_change:
        named = plan.listed(changes) if "plan" in meta else "config.data, config.seed or the files"
        raise StartError(
            "the training data or its batching changed since the checkpoint was made: its "
            f"position {meta['position']} means another batch now. Undo the change of "
            f"{named}, or pass --allow_data_change to go on from there anyway"
        )
    if meta["tokenizer"] != tokenizer.to_dict():
        raise StartError(
            "the tokenizer differs from the checkpoint's, whose head would mean other tokens; "
            "give its vocabulary in config.text.vocabulary, or start anew with config.init.path "
            "and config.init.drop"
        )
    changes = compatibility.differences(meta["config"], config)
    names = [c.get("optim", {}).get("name", "adamw") for c in (meta["config"], config)]
    if names[0] != names[1]:  # each has a state of its own
        changes = {**changes, "optim.name": tuple(names)}
    if changes:
        raise StartError(
            f"the config differs from the checkpoint's in {compatibility.listed(changes)}; use "
            "another workdir, with --config.init.path to start a new run from these weights"
        )
