"""The table of names: every weight by exactly one row, one error for everything, and back."""

import ml_dtypes
import numpy as np
import pytest

from jasr import tree
from jasr.interop import table
from jasr.interop.lazy import Lazy
from jasr.interop.table import Halves, Reshape, Row, TableError

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


def test_floats_of_another_precision_fit_and_keep_it():
    source = {k: v.astype(ml_dtypes.bfloat16) if v.ndim else v for k, v in weights().items()}
    mean = table.convert(ROWS, source, want())["batch_stats"]["stem"]["mean"]
    assert mean is source["stem.bn.running_mean"]


def test_a_parameter_that_the_source_cannot_hold_is_named_on_export():
    with pytest.raises(TableError, match=r"params/extra/kernel \(1,\): no row"):
        table.invert(ROWS, {"params": {"extra": {"kernel": np.zeros(1)}}})


def test_a_row_that_cannot_be_inverted_says_so():
    for row in (Row(r"a\d+", "x"), Row(r"(a|b)", "x")):
        with pytest.raises(TableError, match="cannot be inverted"):
            table.invert((row,), {"x": np.zeros(1)})


def test_a_model_that_keeps_torchs_names_needs_no_table_of_its_own():
    paths = {
        "params/stem_0/kernel": (3, 4, 5),
        "params/stem_1/scale": (5,),
        "batch_stats/stem_1/mean": (5,),
        "params/layers_0/out/kernel": (2, 3),
        "params/layers_11/out/kernel": (2, 3),
        "params/layers_0/gate_2/bias": (3,),
        "params/layers_0/w_left": (2, 2, 2),
        "params/table/embedding": (7, 2),
    }
    goal = tree.unflatten({path: np.ones(shape, np.float32) for path, shape in paths.items()})
    rows = table.torch_rows(goal, {"table": "words.table"})
    shapes = {key: x.shape for key, x in table.invert(rows, goal).items()}
    assert shapes == {
        "stem.0.weight": (5, 4, 3),
        "stem.1.weight": (5,),
        "stem.1.running_mean": (5,),
        "layers.0.out.weight": (3, 2),
        "layers.11.out.weight": (3, 2),
        "layers.0.gate.2.bias": (3,),
        "layers.0.w_left": (2, 2, 2),
        "words.table.weight": (7, 2),
    }
    given = {**table.invert(rows, goal), "stem.1.num_batches_tracked": np.array(7)}
    tree.compare(goal, table.convert(rows, given, goal), dtype=True)


# ---- several keys or several leaves --------------------------------------------------------------

LM = (
    Row(r"blocks\.(\d+)\.in_proj", tuple(rf"p/l\1/{x}" for x in "qkv"), "linear", axis=1),
    Row(r"blocks\.(\d+)\.rope\.(?:base_layer\.)?weight", r"p/l\1/rope", (Halves(2), "linear")),
    Row(r"heads\.(\d+)\.weight", "p/heads", "linear"),
    Row((r"embed\.weight", r"head\.weight"), "p/embedding"),
    Row(r"layers\.(\d+)\.bias_u", "p/bias", copies=3),
    Row(r"norm\.alpha", "p/norm", Reshape((1, 1, -1), (-1,))),
    Row(r"depth\.in_proj", ("p/dq", "p/dk"), Reshape((-1, 4), (3, 2, -1, 4)), axis=1),
)


def published():
    rng = np.random.default_rng(1)
    shapes = {
        **{f"blocks.{n}.in_proj": (9, 4) for n in range(2)},
        **{f"blocks.{n}.rope.weight": (8, 3) for n in range(2)},
        **{f"heads.{n}.weight": (5, 4) for n in range(12)},
        "embed.weight": (7, 4),
        "layers.0.bias_u": (2, 2),
        "norm.alpha": (1, 1, 4),
        "depth.in_proj": (3 * 2 * 5, 4),
    }
    found = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    found["head.weight"] = found["embed.weight"].copy()
    return found | {f"layers.{n}.bias_u": found["layers.0.bias_u"] for n in (1, 2)}


def leaves_of_lm():
    shapes = {f"p/l{n}/{x}": (4, 3) for n in range(2) for x in "qkv"}
    shapes |= {f"p/l{n}/rope": (3, 8) for n in range(2)}
    shapes |= {"p/heads": (12, 4, 5), "p/embedding": (7, 4), "p/bias": (2, 2), "p/norm": (4,)}
    shapes |= {"p/dq": (3, 1, 5, 4), "p/dk": (3, 1, 5, 4)}
    return tree.unflatten({p: np.empty(s, np.float32) for p, s in shapes.items()})


def unread(value):
    """The array as one that is read by slices, and what was read of it."""
    reads = []
    return Lazy(value.shape, value.dtype, lambda at: reads.append(at) or value[at]), reads


def test_weights_are_stacked_cut_permuted_and_tied():
    given = published()
    got = tree.flatten(table.convert(LM, given, leaves_of_lm()))
    np.testing.assert_array_equal(got["p/l1/k"], given["blocks.1.in_proj"][3:6].T)
    np.testing.assert_array_equal(got["p/heads"][11], given["heads.11.weight"].T)
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of two pairs: halves of each
    np.testing.assert_array_equal(got["p/l0/rope"], given["blocks.0.rope.weight"][order].T)
    codebooks = given["depth.in_proj"].reshape(3, 2, 5, 4)
    np.testing.assert_array_equal(np.asarray(got["p/dk"])[2, 0], codebooks[2, 1])


@pytest.mark.parametrize("lazily", [False, True])
def test_both_ways_are_inverse(lazily):
    given = {k: unread(v)[0] if lazily else v for k, v in published().items()}
    back = table.invert(LM, table.convert(LM, given, leaves_of_lm()))
    assert back.keys() == given.keys()
    for name, array in published().items():
        np.testing.assert_array_equal(back[name], array)
        rows = slice(0, 1)
        np.testing.assert_array_equal(back[name][rows], array[rows])
        np.testing.assert_array_equal(back[name][..., 1:], array[..., 1:])


def test_lazy_weights_are_not_read_and_then_by_the_slices_that_are_asked_for():
    heads = {f"heads.{n}.weight": unread(np.full((5, 4), n)) for n in range(3)}
    rows, goal = (LM[2],), {"p": {"heads": np.empty((3, 4, 5), int)}}
    got = table.convert(rows, {k: v for k, (v, _) in heads.items()}, goal)["p"]["heads"]
    assert not any(reads for _, reads in heads.values())
    np.testing.assert_array_equal(got[1, :2], np.ones((2, 5)))
    assert [len(reads) for _, reads in heads.values()] == [0, 1, 0]
    assert heads["heads.1.weight"][1] == [(slice(0, 5), slice(0, 2))]


def test_optional_parts_of_names_are_read_and_not_written():
    given = {"blocks.0.rope.base_layer.weight": np.ones((8, 3))}
    goal = {"p": {"l0": {"rope": np.empty((3, 8))}}}
    back = table.invert((LM[1],), table.convert((LM[1],), given, goal))
    assert list(back) == ["blocks.0.rope.weight"]


def test_what_cannot_be_stacked_cut_or_tied_is_listed():
    given = published()
    del given["heads.3.weight"], given["head.weight"]  # of two names one is enough
    given["heads.12.weight"] = given["heads.0.weight"]
    given["layers.2.bias_u"] = given["layers.2.bias_u"] + 1
    given["blocks.0.in_proj"] = np.zeros((8, 4), np.float32)
    given["blocks.1.rope.weight"] = np.zeros((6, 3), np.float32)
    with pytest.raises(TableError) as error:
        table.convert(LM, given, leaves_of_lm())
    text = str(error.value)
    for line in (
        "p/heads: 12 are stacked; missing [3], unexpected ['heads.12.weight']",
        "~ layers.2.bias_u (2, 2) -> p/bias: differs from layers.0.bias_u",
        "p/l0/v: gives (4, 8), which [3, 3, 3] do not share on axis 1",
        "~ blocks.1.rope.weight (6, 3) -> p/l1/rope: has (6, 3), no pairs of rows for 2 heads",
        "4 in all",
    ):
        assert line in text
    with pytest.raises(TableError, match=r"p/l\\1/v: a part of blocks.0.in_proj"):
        table.invert(LM, {"p": {"l0": {"q": np.zeros((4, 3)), "k": np.zeros((4, 3))}}})


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_are_inverse(seed):
    rng = np.random.default_rng(seed)
    rows, given, goal = [], {}, {}
    for number in range(5):
        count, axis = int(rng.integers(1, 5)), int(rng.integers(0, 2))
        dim = 4 * int(rng.integers(1, 4))
        transform = [("linear",), (Halves(2),), (Halves(1), "linear"), ()][rng.integers(4)]

        def make(rows, dim=dim):
            return rng.standard_normal((rows, dim)).astype(np.float16)

        turned = "linear" in transform
        if rng.integers(2):
            rows.append(Row(rf"s{number}\.(\d+)", f"s{number}", transform, axis))
            given |= {f"s{number}.{n}": make(8) for n in range(count)}
            shape = [dim, 8] if turned else [8, dim]
            goal[f"s{number}"] = np.empty((*shape[:axis], count, *shape[axis:]), np.float32)
        else:
            paths = tuple(f"c{number}/{n}" for n in range(count))
            rows.append(Row(f"c{number}", paths, transform, int(turned)))
            given[f"c{number}"] = make(4 * count)
            goal |= {p: np.empty((dim, 4) if turned else (4, dim), np.float32) for p in paths}
    back = table.invert(rows, table.convert(rows, given, tree.unflatten(goal)))
    assert back.keys() == given.keys()
    for key, array in given.items():
        np.testing.assert_array_equal(back[key], array)
        assert back[key].dtype == array.dtype
