"""What a run starts from: its tokenizer, and its own checkpoint, given weights or scratch."""

import concurrent.futures
import contextlib
import re

import jax

from jasr import checkpoint, settings, text, tree
from jasr.checkpoint.files import READERS
from jasr.checkpoint.read import put
from jasr.data import plan
from jasr.systems import catalogue, compatibility, source

ITEMS = ("params", "batch_stats", "opt_state", "ema")
COUNTERS = ("step", "bad_steps", "bad_in_row", "rng")


@settings.section
class InitConfig:
    """Weights that a new run starts from, and what it does not train."""

    path: str = ""  # a run, step, average, or a model of an original system; "" = scratch. Several
    # give parts of the model: "encoder=PATH,llm=PATH", in Python (("encoder", PATH), ...)
    # "" = the moving average if there is one
    item: str = settings.field("", choices=("", "params", "ema"))
    drop: tuple = ()  # regexes of parameters that are not taken from `path`, e.g. "ctc_head/.*"
    freeze: tuple = ()  # regexes of parameters that get no gradient, or pairs (regex, whether), of
    # which the first that matches says it; the batch statistics of modules that are frozen whole
    # stay too, but training still normalises by each batch
    allow_changes: tuple = ()  # settings that differ from those of `path` on purpose, e.g.
    # "model.lact_mode"; an error about such a difference names them


SCRATCH = InitConfig()


def init_config(mapping):
    """The InitConfig of config.init, whose `path` may be pairs, too."""
    path = mapping.get("path", "")
    if isinstance(path, list | tuple):
        mapping = {**mapping, "path": ",".join(f"{part}={place}" for part, place in path)}
    return settings.build(InitConfig, mapping, "config.init")


def given_paths(path, parts):
    """((name of a part, path), ...) of config.init.path; the name is "" where it gives all.

    parts: names that the system's model has.
    """
    names = "|".join(map(re.escape, parts))
    if not names or not re.match(f"({names})=", path):
        return (("", path),)
    return tuple(tuple(x.split("=", 1)) for x in re.split(rf",\s*(?=(?:{names})=)", path))


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
        parts = {name for system in catalogue.every() for name in system.parts}
        path = given_paths(given.path, sorted(parts))[0][1]
        return text.from_dict(source.load_meta(source.place(path, given.item))["tokenizer"])
    if config.vocabulary:
        return text.CharTokenizer((text.BLANK, *config.vocabulary), config.normalisation)
    return text.CharTokenizer.from_texts(texts(), config.normalisation)


class StartError(ValueError):
    """A run cannot start or go on as asked."""


def frozen_paths(params, patterns):
    """The set of parameter paths that the rules of config.init.freeze name.

    Raises:
      tree.TreeError: a regex that matches nothing; StartError: nothing is left to train.
    """
    rules = [(p, True) if isinstance(p, str) else tuple(p) for p in patterns]
    paths = list(tree.flatten(params))
    found = tree.match(rules, paths, what="config.init.freeze rule", optional=True)
    frozen = {path for path, whether in found.items() if whether}
    if len(frozen) == len(paths):
        raise StartError("config.init.freeze freezes every parameter: nothing is left to train")
    return frozen


def to_items(state, written):
    """The checkpoint items of a TrainState (or of its shapes).

    written: paths of the frozen parameters that are saved, since no origin holds them.
    """
    items = {name: getattr(state, name) for name in ITEMS}
    items["counters"] = {name: getattr(state, name) for name in COUNTERS}
    items["frozen"] = tree.split(state.frozen, written)[0]
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def written_of(frozen, meta):
    """The frozen parameters that a step holds itself: those that no origin of its meta names."""
    origins = source.origins(meta)
    if any("leaves" not in origin for origin in origins):  # earlier revisions: all or none
        return frozenset()
    return frozenset(frozen) - {path for origin in origins for path in origin["leaves"]}


def from_items(shapes, items, frozen):
    """The TrainState of restored items; `frozen` {path: array} are the parameters not saved."""
    given = {name: items.get(name, getattr(shapes, name)) for name in ITEMS}
    frozen = {**tree.flatten(items.get("frozen", {})), **frozen}
    frozen = tree.unflatten({p: frozen[p] for p in tree.flatten(shapes.frozen)})
    return shapes.replace(**given, **items["counters"], frozen=frozen)


# ---- origins -------------------------------------------------------------------------------------


def origins(given, config):
    """The origins that config.init.path names, see `systems.source`.

    Raises:
      StartError: a part that may not come from the system that its origin is of.
    """
    system, found = catalogue.get(config["task"]), []
    for name, path in given_paths(given.path, system.parts):
        origin = source.resolve(path, given.item)
        if name:
            part = system.parts[name]
            theirs = catalogue.today(source.load_meta(origin, False)["config"]["task"])
            if theirs not in part.sources:
                raise StartError(
                    f"config.init.path: the part {name!r} comes from {', '.join(part.sources)}; "
                    f"{path} is of {theirs}"
                )
            origin |= {"part": name, "to": part.prefix, "from": part.sources[theirs][0]}
        found.append(origin)
    return found


def given_leaves(found, given, shapes):
    """Per origin {"params/..." or "batch_stats/...": array-like} of this model's names, checked.

    Args:
      found: what `origins` made. given: InitConfig. shapes: of the task's variables.

    Raises:
      tree.TreeError: names or shapes differ from the model's (lists every one); a drop rule that
        matches nothing.
    """
    wanted = tree.flatten(shapes["params"])
    rules = [(p, True) for p in given.drop]
    tree.match(rules, wanted, what="config.init.drop rule", optional=True)
    result = []
    for origin in found:
        leaves = source.renamed(source.leaves(origin), origin)
        params, stats = (
            {p.removeprefix(kind): x for p, x in leaves.items() if p.startswith(kind)}
            for kind in ("params/", "batch_stats/")
        )
        params = {p: x for p, x in params.items() if not _dropped(p, given.drop)}
        want = {p: x for p, x in wanted.items() if _taken(p, origin, given)}
        tree.compare(want, params, what=f"config.init.path {origin['path']}")
        want = {p: x for p, x in tree.flatten(shapes["batch_stats"]).items() if _inside(p, origin)}
        if want:
            tree.compare(want, stats, what=f"batch statistics of {origin['path']}")
        named = {f"params/{p}": x for p, x in params.items()}
        result.append(named | {f"batch_stats/{p}": stats[p] for p in want})
    return result


def _inside(path, origin):
    return not origin.get("to") or path.startswith(origin["to"] + "/")


def _taken(path, origin, given):
    return _inside(path, origin) and not _dropped(path, given.drop)


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
    taken = [p for p in paths if _taken(p, origin, given)]
    tokens = any(re.fullmatch(task.token_parameters, p) for p in taken)
    meta = source.load_meta(origin, tokens)
    changes = _differences(origin, meta["config"], config)
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


def _differences(origin, theirs, ours):
    """`compatibility.differences` of the whole config, or of the section of an origin's part."""
    if "part" not in origin:
        return compatibility.differences(theirs, ours)
    system = catalogue.get(ours["task"])
    part = system.parts[origin["part"]]
    section, *inner = part.section.split(".")
    cls = catalogue.sections(system)[section]
    sample = settings.build(cls, ours.get(section, {}), f"config.{section}")
    for name in inner:
        sample = getattr(sample, name)
    where = part.sources[catalogue.today(theirs["task"])][1]
    mappings = (_section(theirs, where), _section(ours, part.section))
    return compatibility.section_differences(type(sample), *mappings, part.section)


def _section(config, where):
    for name in where.split("."):
        config = config.get(name, {})
    return config


def _dropped(path, patterns):
    return any(re.fullmatch(p, path) for p in patterns)


def state_from(fresh, shapes, leaves):
    """A TrainState of given leaves; only the others are drawn, and compiled.

    Args:
      fresh: function of no argument that draws the whole state.
      shapes: a TrainState of ShapeDtypeStructs with their shardings.
      leaves: {"params/...": array-like}; a frozen parameter and a moving average begin as the
        parameter of that path.
    """
    named = [
        (re.sub("^(frozen|ema)/", "params/", path), like)
        for path, like in checkpoint.leaves(shapes).items()
    ]
    missing = [n for n, (name, _) in enumerate(named) if name not in leaves]

    def draw():
        whole = jax.tree.leaves(fresh())
        return [whole[n] for n in missing]

    drawn = jax.jit(draw, out_shardings=[named[n][1].sharding for n in missing])()
    drawn = dict(zip(missing, drawn, strict=True))

    def leaf(n):
        name, like = named[n]
        return drawn[n] if n in drawn else put(leaves[name], like.dtype, like.sharding)

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(leaf, range(len(named))))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def keep(found, leaves, frozen, workdir):
    """(origins, leaves) with what a run needs later kept: an origin that gives frozen parameters
    names them, and is copied where its own run could delete it (`source.keep`)."""
    origins, kept = [], []
    for origin, given in zip(found, leaves, strict=True):
        named = sorted(p for p in frozen if f"params/{p}" in given)
        if named:
            origin = source.keep(origin, workdir) | {"leaves": named}
            again = source.renamed(source.leaves(origin, verify=False), origin)
            given = {path: again[path] for path in given}
        origins.append(origin)
        kept.append(given)
    return origins, kept


def frozen_from(origins):
    """What a step's meta says of the origins of its frozen parameters."""
    naming = [origin for origin in origins if origin.get("leaves", True)]
    return naming[0] if len(naming) == 1 else naming or {}


def read_frozen(meta, shapes, workdir):
    """({path: array} of the frozen parameters that a step names, their origins where they are now).

    shapes: tree of the frozen parameters' ShapeDtypeStructs with their shardings.

    Raises:
      StartError: an origin does not hold one of them.
    """
    found, frozen = {}, tree.flatten(shapes)
    located = [source.locate(origin, workdir) for origin in source.origins(meta)]
    for origin in located:
        given = source.renamed(source.leaves(origin), origin)
        wanted = {p: frozen[p] for p in origin.get("leaves", frozen) if p in frozen}
        if missing := sorted(p for p in wanted if f"params/{p}" not in given):
            raise StartError(
                f"{origin['path']} does not hold the frozen parameters {', '.join(missing)}"
            )
        leaves = {p: given[f"params/{p}"] for p in wanted}
        tree.compare(wanted, leaves, what=f"frozen parameters of {origin['path']}")
        found |= {p: put(x, wanted[p].dtype, wanted[p].sharding) for p, x in leaves.items()}
    return found, located


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
