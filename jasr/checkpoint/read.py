"""Reading checkpoints: whole trees as numpy anywhere, onto a mesh, or one leaf at a time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jasr import tree as trees
from jasr.checkpoint.files import CheckpointError, find_step, first_line, items, read_meta
from jasr.interop import lazy


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
    stored = Leaves(directory / name)
    if stored.plain:
        return trees.unflatten(stored.in_memory())
    handler = ocp.PyTreeCheckpointHandler()
    kinds = handler.metadata(directory / name).tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
    with told_where(directory / name):
        return handler.restore(directory / name, args=ocp.args.PyTreeRestore(restore_args=args))


def load_meta(path, step=None):
    """The JSON dict saved beside the trees: config, tokenizer, task, data position ..."""
    return read_meta(find_step(path, step, items=()))


def leaves(tree):
    """{path: leaf} of any pytree (NamedTuples and lists too), "0/mu/model/w"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}


def read_like(directory, like):
    like_encoded = jax.tree.map(_encode_abstract, like)
    handler = ocp.PyTreeCheckpointHandler()
    has, want, got = items(directory), {}, {}
    for name, item in like_encoded.items():
        want |= {f"{name}/{p}": x for p, x in leaves(item).items()}
        if name in has:
            kinds = handler.metadata(directory / name).tree
            got |= {f"{name}/{p}": x for p, x in leaves(kinds).items()}
    try:
        trees.compare(want, got, dtype=True, what=f"checkpoint {directory}")
    except trees.TreeError as e:
        raise CheckpointError(f"{e}\nIs this the config that the run was made with?") from None
    state = {}
    reader = ocp.Checkpointer(handler)
    for name, item in like_encoded.items():
        if not jax.tree.leaves(item):
            state[name] = item
            continue
        args = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(_restore_args, item))
        with told_where(directory / name):
            state[name] = reader.restore(directory / name, args=args)
    return jax.tree.map(_decode, like, state)


_OF_A_DICT = 2  # Orbax's number for a key of a dict


class Leaves:
    """The leaves of one item of a step, opened and read one at a time.

    Attributes:
      directory: of the item.
      kinds: {path: ShapeDtypeStruct}, in the order of the tree.
      plain: whether the tree is one of dicts alone.
    """

    def __init__(self, directory):
        self.directory = directory
        with told_where(directory):
            text = json.loads((directory / "_METADATA").read_text(encoding="utf-8"))
            opening = {path: _open(directory, *how) for path, how in _places(text)}
            self._stores = {path: store.result() for path, store in opening.items()}
        self.kinds = {
            path: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype)
            for path, store in self._stores.items()
        }
        leaves = text["tree_metadata"].values()
        keys = [key["key_type"] for leaf in leaves for key in leaf["key_metadata"]]
        self.plain = len(leaves) == len(self.kinds) and set(keys) <= {_OF_A_DICT}

    def arrays(self):
        """{path: Lazy}, read by slices."""
        return {path: self._lazy(path, kind) for path, kind in self.kinds.items()}

    def _lazy(self, path, kind):
        def into(out, at=...):
            import tensorstore as ts

            with told_where(self.directory):
                ts.array(out).write(self._stores[path][at]).result()
            return out

        def read(at):
            return into(lazy.empty([a.stop - a.start for a in at], kind.dtype), at)

        return lazy.Lazy(kind.shape, kind.dtype, read, into)

    def in_memory(self):
        """{path: numpy array} of all leaves. One is read while the one before it is finished: all
        at once, tensorstore takes twice the time."""
        import tensorstore as ts

        found, reading = {}, None
        with told_where(self.directory):
            for path, kind in self.kinds.items():
                found[path] = lazy.empty(kind.shape, kind.dtype)
                last, reading = reading, ts.array(found[path]).write(self._stores[path])
                if last:
                    last.result()
            if reading:
                reading.result()
        return found


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


def is_key(x):
    return jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)


def _encode_abstract(x):
    sharding = getattr(x, "sharding", None)
    if is_key(x):
        shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _decode(like, x):
    if not is_key(like):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), like.dtype)))


def _restore_args(x):
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


class told_where:
    """Turns the many-line errors of the array reader into one that names the directory."""

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and isinstance(error, Exception):
            raise CheckpointError(f"{self.directory}: {first_line(error)}") from error
