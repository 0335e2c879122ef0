import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jasr import sharding, tree

PARAMS = {"a": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
RULES = (("a/kernel", ("fsdp", "tensor")), (".*/bias", ("tensor",)))


def mesh(**axes):
    return sharding.make_mesh(sharding.MeshConfig(**axes))


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_mesh_that_does_not_cover_the_devices_raises():
    with pytest.raises(ValueError, match="8 devices"):
        mesh(data=3)
    with pytest.raises(ValueError, match="only one axis"):
        mesh(data=-1, fsdp=-1)


def test_rules_give_specs_and_an_axis_that_does_not_divide_is_dropped():
    where = sharding.param_shardings(PARAMS, mesh(data=1, fsdp=2, tensor=4), RULES)
    assert where["a"]["kernel"].spec == P("fsdp", None)  # 6 columns over 4 devices
    where = sharding.param_shardings(PARAMS, mesh(data=2, fsdp=2, tensor=2), RULES)
    assert where["a"]["kernel"].spec == P("fsdp", "tensor")
    with pytest.raises(tree.TreeError, match="no sharding rule"):
        sharding.param_shardings(PARAMS, mesh(), RULES[:1])


def test_optimizer_moments_follow_their_parameter():
    m = mesh(data=2, fsdp=2, tensor=2)
    where = sharding.param_shardings(PARAMS, m, RULES)
    state = jax.eval_shape(optax.adam(1.0).init, PARAMS)
    placed = sharding.like_params(state, PARAMS, where, m)
    assert placed[0].mu["a"]["kernel"].spec == P("fsdp", "tensor")
    assert placed[0].count.spec == P()


def test_batch_rows_are_split_over_data_and_fsdp():
    batch = sharding.put_batch({"audio": jnp.ones((8, 5))}, mesh(data=2, fsdp=2, tensor=2))
    assert batch["audio"].addressable_shards[0].data.shape == (2, 5)
    with pytest.raises(ValueError, match="accumulate"):
        sharding.check_batch_sizes([8], mesh(data=4, fsdp=1, tensor=2), accumulate=3)


def test_processes_are_found_in_torchrun_and_open_mpi_variables():
    find = sharding._from_environment
    env = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h"}
    assert find(env) == ("h:12355", 4, 1)
    env = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "MASTER_ADDR": "h"}
    assert find(env | {"MASTER_PORT": "9"}) == ("h:9", 2, 0)
    assert find({}) is None
    assert sharding.init_distributed(env={}) is False
    with pytest.raises(ValueError, match="all three"):
        sharding.init_distributed("h:1", env={})
