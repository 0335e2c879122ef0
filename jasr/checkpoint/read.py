"""Reading checkpoints: whole trees as numpy anywhere, onto a mesh, or one leaf at a time."""

import concurrent.futures
import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jasr import tree as trees
from jasr.checkpoint.files import (
    READERS,
    CheckpointError,
    find_step,
    first_line,
    items,
    read_meta,
)
from jasr.interop import lazy

_OF_A_DICT = 2  # Orbax's number for a key of a dict


def load_params(path, step=None, item="", verify=True):
    """A tree of a checkpoint as nested dicts of numpy arrays; needs no model and no device.

    Works for a checkpoint of any mesh, on any machine.

    Args:
      path, step: see `find_step`.
      item: "params", "ema", "batch_stats", "opt_state" ...; "" is the moving average `ema` if
        the run kept one, else `params`.
      verify: compare the checksums of the files that are read.

    Raises:
      CheckpointError: no such step or item, or damaged.
    """
    directory = find_step(path, step, (item,) if item else ("ema", "params"), verify)
    has = items(directory)
    name = item or ("ema" if "ema" in has else "params")
    if name not in has:
        if name == "batch_stats":  # a model without running statistics
            return {}
        raise CheckpointError(f"{directory} has no item {name!r}, only {has}")
    found = in_memory(arrays(directory / name))
    if _is_of_dicts(directory / name):
        return trees.unflatten(found)
    with told_where(directory / name):
        lists_too = ocp.PyTreeCheckpointHandler().metadata(directory / name).tree
        return jax.tree.unflatten(jax.tree.structure(lists_too), found.values())


def load_meta(path, step=None):
    """The JSON dict saved beside the trees: config, tokenizer, task, data position ..."""
    return read_meta(find_step(path, step, items=()))


def leaves(tree):
    """{path: leaf} of any pytree (NamedTuples and lists too), "0/mu/model/w"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}


def read_like(directory, like):
    """The items of a step as `Checkpoints.restore` gives them."""
    has, want = items(directory), leaves(like)
    stored = {
        f"{name}/{path}": x
        for name in like
        if name in has
        for path, x in arrays(directory / name).items()
    }
    try:
        kinds = {path: _as_stored(x) for path, x in want.items()}
        trees.compare(kinds, stored, dtype=True, what=f"checkpoint {directory}")
    except trees.TreeError as e:
        raise CheckpointError(f"{e}\nIs this the config that the run was made with?") from None
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda path: _placed(stored[path], want[path]), want)
        return jax.tree.unflatten(jax.tree.structure(like), list(found))


def arrays(directory):
    """{path: lazy.Lazy} of one item of a step, in the order of the tree, read by slices."""
    with told_where(directory):
        opening = {path: _open(directory, *how) for path, how in _places(_description(directory))}
        return {path: _lazy(directory, store.result()) for path, store in opening.items()}


def in_memory(found):
    """{path: numpy array} of array-likes by path; two are read at a time: all at once, tensorstore
    takes twice the time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(found, pool.map(lazy.owned, found.values()), strict=True))


def put(value, dtype, sharding):
    """An array-like as a global array; each process reads the slices that it holds."""

    def read(index):
        return lazy.owned(value[index], dtype)

    return jax.make_array_from_callback(tuple(value.shape), sharding, read)


def is_key(x):
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def _as_stored(x):
    if is_key(x):
        return jax.eval_shape(jax.random.key_data, x)
    return x if hasattr(x, "dtype") else np.asarray(x)


def _placed(value, like):
    sharding = getattr(like, "sharding", None)
    value = lazy.owned(value) if sharding is None else put(value, value.dtype, sharding)
    if is_key(like):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return value


# ---- Orbax's files -------------------------------------------------------------------------------


def _description(directory):
    return json.loads((directory / "_METADATA").read_text(encoding="utf-8"))


def _is_of_dicts(directory):
    """Whether a tree is one of dicts with leaves alone."""
    leaves = _description(directory)["tree_metadata"].values()
    empty = any(leaf["value_metadata"].get("skip_deserialize") for leaf in leaves)
    kinds = {key["key_type"] for leaf in leaves for key in leaf["key_metadata"]}
    return not empty and kinds <= {_OF_A_DICT}


def _places(description):
    """(path, (name, driver, store)) of every array in Orbax's description of an item."""
    driver = "zarr3" if description.get("use_zarr3") else "zarr"
    store = "ocdbt" if description.get("use_ocdbt", True) else "file"
    for leaf in description["tree_metadata"].values():
        if not leaf["value_metadata"].get("skip_deserialize"):
            keys = [str(k["key"]) for k in leaf["key_metadata"]]
            yield "/".join(keys), (".".join(keys), driver, store)


def _open(directory, name, driver, store):
    import tensorstore as ts

    base = f"file://{directory}/"
    place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": driver, "kvstore": place if store == "ocdbt" else f"{base}{name}/"}
    return ts.open(spec, open=True, read=True)


def _lazy(directory, store):
    dtype = store.dtype.numpy_dtype

    def into(out, at=...):
        import tensorstore as ts

        with told_where(directory):
            ts.array(out).write(store[at]).result()
        return out

    def read(at):
        return into(lazy.empty([a.stop - a.start for a in at], dtype), at)

    return lazy.Lazy(store.shape, dtype, read, into)


@contextlib.contextmanager
def told_where(directory):
    """Turns the many-line errors of the array reader into one that names the directory."""
    try:
        yield
    except Exception as e:
        raise CheckpointError(f"{directory}: {first_line(e)}") from e
