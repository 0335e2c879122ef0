"""The table of names: every weight by exactly one row, one error for everything, and back."""

import ml_dtypes
import numpy as np
import pytest

from jasr import tree
from jasr.interop import table
from jasr.interop.table import Row, TableError

ROWS = (
    Row(r"blocks\.(\d+)\.(q|k)_proj\.weight", r"params/layers_\1/\2/kernel", "linear"),
    Row(r"blocks\.(\d+)\.(q|k)_proj\.bias", r"params/layers_\1/\2/bias"),
    Row(r"stem\.conv\.weight", "params/stem/kernel", "conv2d"),
    Row(r"stem\.depth\.weight", "params/depth/kernel", "conv1d"),
    Row(r"stem\.bn\.running_mean", "batch_stats/stem/mean"),
    Row(r".*num_batches_tracked", None),
)


def weights():
    rng = np.random.default_rng(0)
    shapes = {
        "stem.conv.weight": (5, 2, 3, 4),
        "stem.depth.weight": (6, 1, 3),
        "stem.bn.running_mean": (5,),
        **{f"blocks.{n}.{x}_proj.weight": (3, 2) for n in (0, 10) for x in "qk"},
        **{f"blocks.{n}.{x}_proj.bias": (3,) for n in (0, 10) for x in "qk"},
    }
    result = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**result, "stem.bn.num_batches_tracked": np.array(7)}


def want(dtype=np.float32):
    shapes = {
        "params/stem/kernel": (3, 4, 2, 5),
        "params/depth/kernel": (3, 1, 6),
        "batch_stats/stem/mean": (5,),
        **{f"params/layers_{n}/{x}/kernel": (2, 3) for n in (0, 10) for x in "qk"},
        **{f"params/layers_{n}/{x}/bias": (3,) for n in (0, 10) for x in "qk"},
    }
    return tree.unflatten({path: np.empty(shape, dtype) for path, shape in shapes.items()})


def test_every_weight_arrives_under_its_name_and_axes():
    source = weights()
    got = table.convert(ROWS, source, want())
    tree.compare(want(), got, dtype=True)
    kernel = got["params"]["layers_10"]["k"]["kernel"]
    np.testing.assert_array_equal(kernel, source["blocks.10.k_proj.weight"].T)
    stem = got["params"]["stem"]["kernel"]
    assert stem[2, 3, 1, 4] == source["stem.conv.weight"][4, 1, 2, 3]
    assert np.shares_memory(stem, source["stem.conv.weight"])


def test_inverted_it_gives_the_source_back():
    source = weights()
    back = table.invert(ROWS, table.convert(ROWS, source, want()))
    del source["stem.bn.num_batches_tracked"]
    assert back.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(back[name], array)


def test_one_error_lists_everything():
    source = weights()
    del source["blocks.0.q_proj.bias"]
    source["blocks.1.q_proj.bias"] = np.zeros(3, np.float32)
    source["head.weight"] = np.zeros((2, 2), np.float32)
    source["stem.conv.weight"] = np.zeros((5, 2, 3, 5), np.float32)
    source["stem.depth.weight"] = np.zeros((6, 3), np.float32)
    source["stem.bn.running_mean"] = np.zeros(5, np.int64)
    with pytest.raises(TableError) as error:
        table.convert(ROWS, source, want(), what="a.pt: the weights")
    text = str(error.value)
    assert text.startswith("a.pt: the weights do not fit")
    for line in (
        "- params/layers_0/q/bias (3,)",
        "+ blocks.1.q_proj.bias (3,) -> params/layers_1/q/bias: not in the model",
        "+ head.weight (2, 2): no row of the table for it",
        "~ stem.conv.weight (5, 2, 3, 5) -> params/stem/kernel: gives (3, 5, 2, 5), the model has "
        "(3, 4, 2, 5)",
        "~ stem.depth.weight (6, 3) -> params/depth/kernel: has 2 axes, conv1d takes 3",
        "~ stem.bn.running_mean (5,) -> batch_stats/stem/mean: is int64, the model has float32",
    ):
        assert line in text
    assert "6 in all" in text


def test_two_rows_for_a_key_and_two_keys_for_a_path_are_refused():
    rows = (Row("a", "x"), Row("[ab]", "y"), Row("c", "y"), Row("d", "y"))
    source = {name: np.zeros(1, np.float32) for name in "acd"}
    goal = {"y": np.zeros(1, np.float32)}
    with pytest.raises(TableError, match=r"a \(1,\): 2 rows of the table[^$]*d: y was filled by c"):
        table.convert(rows, source, goal)


def test_floats_are_cast_to_the_models_dtype():
    source = {k: v.astype(ml_dtypes.bfloat16) if v.ndim else v for k, v in weights().items()}
    got = table.convert(ROWS, source, want())
    mean = got["batch_stats"]["stem"]["mean"]
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, source["stem.bn.running_mean"].astype(np.float32))


def test_a_parameter_that_the_source_cannot_hold_is_named_on_export():
    with pytest.raises(TableError, match=r"params/extra/kernel \(1,\): no row"):
        table.invert(ROWS, {"params": {"extra": {"kernel": np.zeros(1)}}})


def test_a_row_that_cannot_be_inverted_says_so():
    for row in (Row(r"a\d+", "x"), Row(r"(a|b)", "x")):
        with pytest.raises(TableError, match="cannot be inverted"):
            table.invert((row,), {"x": np.zeros(1)})
