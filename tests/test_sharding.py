import jax
import jax.numpy as jnp
import numpy as np
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


def test_what_differs_between_processes_is_named_with_the_processes():
    digests = np.zeros((3, 2, 8), np.uint8)
    assert sharding.differing(["config", "training data"], digests) == []
    digests[1, 1] = 0xAB
    (line,) = sharding.differing(["config", "training data"], digests)
    assert line == "training data: 00000000 on process 0, 2; abababab on process 1"


def found(**env):
    return sharding._from_environment(env)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "LOCAL_RANK": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "MASTER_ADDR": "h"}


def test_processes_are_found_in_torchrun_and_open_mpi_variables():
    assert found(**TORCHRUN) == dict(coordinator_address="h:12355", num_processes=4, process_id=3)
    want = dict(coordinator_address="h:9", num_processes=2, process_id=0)
    assert found(**MPI, MASTER_PORT="9") == want
    assert found(**MPI, OMPI_MCA_orte_hnp_uri="u") is None
    assert found() is None
    assert sharding.init_distributed(env={}) is False
    assert sharding.init_distributed(env=TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is False
    with pytest.raises(ValueError, match="all three"):
        sharding.init_distributed("h:1", env={})


def test_the_port_of_torchruns_own_store_is_left_to_it():
    at = {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert found(**TORCHRUN, **at)["coordinator_address"] == "h:29501"
    at["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    assert found(**TORCHRUN, **at)["coordinator_address"] == "h:29500"


def test_processes_of_one_host_take_the_accelerator_of_their_local_rank():
    two = {"LOCAL_WORLD_SIZE": "2"}
    assert found(**TORCHRUN, **two)["local_device_ids"] == [1]
    mpi = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert found(**mpi)["local_device_ids"] == [0]
    assert found(**TORCHRUN, **two, CUDA_VISIBLE_DEVICES="4,5")["local_device_ids"] == [1]
    for other in (
        {"LOCAL_WORLD_SIZE": "1"},
        two | {"CUDA_VISIBLE_DEVICES": "5"},
        two | {"JAX_LOCAL_DEVICE_IDS": "0,1"},
    ):
        assert "local_device_ids" not in found(**TORCHRUN, **other), other
