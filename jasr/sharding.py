"""The device mesh, regex rules to shardings, and start-up of several processes.

The mesh has three axes: `data` (batch rows), `fsdp` (batch rows and parameters) and `tensor`
(parameters). A model gives rules `(regex over parameter paths, axis name or None per dimension)`;
everything that mirrors a parameter (optimizer moments, EMA) follows it. The collectives are JAX's
own: `jax.jit` with these shardings.
"""

import hashlib
import itertools
import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jasr import settings, tree

_meetings = itertools.count()
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


@settings.section
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 = all devices that are left."""

    data: int = settings.field(-1, least=-1)
    fsdp: int = settings.field(1, least=-1)
    tensor: int = settings.field(1, least=-1)


def make_mesh(config, devices=None):
    """A mesh ("data", "fsdp", "tensor") of the given sizes over all devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"config.mesh: only one axis may be -1, got {dict(zip(AXES, sizes))}")
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"config.mesh {dict(zip(AXES, sizes))} does not cover {len(devices)} devices; "
            "their product must equal the number of devices"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _spec(axes, shape, mesh):
    """The PartitionSpec of one array; an axis that does not divide its dimension is dropped."""
    if axes is None:
        return P()
    if len(axes) > len(shape):
        raise ValueError(f"sharding rule {axes} has more dimensions than the shape {shape}")
    kept = []
    for size, axis in zip(shape, tuple(axes) + (None,) * (len(shape) - len(axes)), strict=True):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        ways = math.prod(mesh.shape[n] for n in names)
        kept.append(axis if names and size % ways == 0 else None)
    return P(*kept)


def param_shardings(params, mesh, rules):
    """A tree of NamedSharding like `params` by strict rules (see `tree.match`)."""
    flat = tree.flatten(params)
    axes = tree.match(rules, flat, what="sharding rule")
    return tree.unflatten(
        {p: NamedSharding(mesh, _spec(axes[p], tuple(x.shape), mesh)) for p, x in flat.items()}
    )


def like_params(state, params, shardings, mesh):
    """Shardings for any pytree whose leaves partly mirror parameters (optimizer state, EMA).

    A leaf whose path ends in a parameter's path and has its shape follows that parameter; every
    other leaf is replicated.
    """
    shapes = {p: tuple(x.shape) for p, x in tree.flatten(params).items()}
    where = tree.flatten(shardings)

    def one(path, leaf):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        mirrored = (where[tail] for tail in tails if shapes.get(tail) == tuple(leaf.shape))
        return next(mirrored, NamedSharding(mesh, P()))

    return jax.tree_util.tree_map_with_path(one, state)


def put_batch(batch, mesh):
    """This process's rows of a batch as global arrays split over ("data", "fsdp").

    Args:
      batch: dict of numpy arrays [B / process_count, ...], this process's contiguous rows.
    """
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()
    }


def batch_ways(mesh):
    """The number of parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_sizes(sizes, mesh, accumulate=1):
    """Raises ValueError if a global batch size does not divide over mesh and accumulation."""
    ways = batch_ways(mesh)
    for size in sizes:
        if size % (ways * accumulate):
            raise ValueError(
                f"a batch of {size} rows does not divide over data x fsdp = {ways} devices "
                f"times config.optim.accumulate = {accumulate}; change config.data.batch_* or mesh"
            )
    if jax.process_count() > 1 and ways % jax.process_count():
        raise ValueError(
            f"data x fsdp = {ways} must be a multiple of the {jax.process_count()} processes; "
            "the tensor axis must not span processes"
        )


def check_same(facts):
    """Raises ValueError on every process, naming what differs, unless all have the same facts.

    facts: {what: str}, the same keys everywhere.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    meet()  # reading a manifest may take one host minutes longer
    mine = [hashlib.sha256(text.encode()).digest()[:8] for text in facts.values()]
    mine = np.frombuffer(b"".join(mine), np.uint8).reshape(len(facts), 8)
    wrong = differing(list(facts), multihost_utils.process_allgather(mine))
    if wrong:
        raise ValueError(
            "the processes of this run do not agree; all need the same config and must see the "
            "same manifests and audio files:\n  " + "\n  ".join(wrong)
        )


def meet(patience=3600):
    """Returns when every process has come here.

    They meet at the coordinator: a collective would give up on a process that still compiles.
    patience: seconds until the wait is an error.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        ocp.multihost.get_barrier_sync_fn()(
            key=f"jasr meeting {next(_meetings)}", timeout_ms=1000 * patience
        )


def differing(names, digests):
    """A line for each fact that is not the same everywhere: which processes have which digest.

    digests: u8[process, fact, byte].
    """
    wrong = []
    for name, column in zip(names, np.moveaxis(digests, 1, 0), strict=True):
        groups = {}
        for process, digest in enumerate(column):
            groups.setdefault(digest.tobytes().hex()[:8], []).append(str(process))
        if len(groups) > 1:
            parts = [f"{d} on process {', '.join(which)}" for d, which in groups.items()]
            wrong.append(f"{name}: " + "; ".join(parts))
    return wrong


def _place(address, processes, process):
    """Arguments of `jax.distributed.initialize`."""
    return dict(coordinator_address=address, num_processes=processes, process_id=process)


def _from_environment(env):
    """Arguments of `jax.distributed.initialize` by torchrun's or Open MPI's variables, or None."""
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        size, rank, local_size, local_rank = "WORLD_SIZE RANK LOCAL_WORLD_SIZE LOCAL_RANK".split()
    elif "OMPI_COMM_WORLD_SIZE" in env and "MASTER_ADDR" in env:
        if "OMPI_MCA_orte_hnp_uri" in env:
            return None  # JAX knows Open MPI 4
        names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
        size, rank, local_size, local_rank = (f"OMPI_COMM_WORLD_{n}" for n in names)
    else:
        return None
    # torchrun's own store listens on MASTER_PORT.
    port = int(env.get("MASTER_PORT", "12355"))
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    found = _place(f"{env['MASTER_ADDR']}:{port}", int(env[size]), int(env[rank]))
    alone = int(env.get(local_size, "1")) == 1 or local_rank not in env
    own = env.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # the launcher gave it one device
    if not (alone or own or "JAX_LOCAL_DEVICE_IDS" in env):
        found["local_device_ids"] = [int(env[local_rank])]
    return found


def init_distributed(coordinator="", num_processes=0, process_id=-1, env=None):
    """Joins this process to a run of several; True if there is more than one process.

    The order is: explicit values, torchrun-style variables (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), Open MPI's with MASTER_ADDR, then what JAX detects by itself (Slurm, Open MPI 4).
    Without any of these nothing is started. Where variables tell of several processes on a host,
    each takes the accelerator of its local rank, or those of JAX_LOCAL_DEVICE_IDS (e.g. "0,1").

    Raises:
      ValueError: some but not all of the explicit values are given.
    """
    env = os.environ if env is None else env
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(given) and not all(given):
        raise ValueError(
            "several processes need all three: --coordinator=HOST:PORT, --num_processes and "
            f"--process_id; got {coordinator!r}, {num_processes}, {process_id}"
        )
    found = _from_environment(env)
    if all(given):
        found = _place(coordinator, num_processes, process_id)
    if found is not None and found["num_processes"] == 1:
        return False
    slurm = int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env
    openmpi = "OMPI_MCA_orte_hnp_uri" in env and int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    if found is None and not (slurm or openmpi):
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs in flight may reach gloo in another order on another process, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(**(found or {}))
    return jax.process_count() > 1
