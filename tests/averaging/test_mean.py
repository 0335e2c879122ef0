"""Averages of parameter trees and of checkpoints."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jasr
from jasr import averaging, checkpoint
from jasr.averaging import AverageError, find_members, parse_name, select, weigh


def tree_of(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(70, 1001)).astype(dtype)},
        "b": rng.normal(size=()).astype(dtype)[()] * np.ones((), dtype),
        "signed": np.array([0.0, -0.0, 1e-30, -3e38 if dtype == np.float32 else -3.0], dtype),
    }


def same_bits(x, y):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("weights", [None, (0.1, 0.2, 0.7), (0.0, 0.3, 0.7)])
def test_average_of_equal_trees_is_the_tree_bit_for_bit(dtype, weights):
    t = tree_of(0, dtype)
    got = jasr.average([t, t, t], weights)
    for path, leaf in checkpoint.leaves(got).items():
        same_bits(leaf, np.asarray(checkpoint.leaves(t)[path]))


def test_weighted_mean_in_float32_within_an_ulp_or_two():
    trees = [tree_of(i) for i in range(5)]
    weights = [0.1, 0.3, 0.2, 0.25, 0.15]
    got = jasr.average(trees, weights)
    want = sum(w * t["a"]["kernel"].astype(np.float64) for w, t in zip(weights, trees, strict=True))
    assert got["a"]["kernel"].dtype == np.float32
    np.testing.assert_allclose(got["a"]["kernel"], want, rtol=3e-7, atol=3e-7)
    one_hot = jasr.average(trees, [0, 0, 1, 0, 0])
    same_bits(one_hot["a"]["kernel"], trees[2]["a"]["kernel"])


def test_bfloat16_is_accumulated_in_float32():
    values = [1.0, 1.0078125, 1.0, 1.0078125]  # the mean lies between two bfloat16s
    trees = [{"w": np.full(3, v, ml_dtypes.bfloat16)} for v in values] + [
        {"w": np.full(3, 2.0, ml_dtypes.bfloat16)}
    ]
    got = jasr.average(trees)["w"]
    want = np.mean([*values, 2.0], dtype=np.float32).astype(ml_dtypes.bfloat16)
    assert got.dtype == ml_dtypes.bfloat16 and (got == want).all()


def test_any_pytree_of_jax_arrays_averages():
    got = jasr.average([[jnp.zeros(3), (jnp.ones(2),)], [jnp.ones(3), (jnp.ones(2),)]])
    np.testing.assert_array_equal(got[0], np.full(3, 0.5, np.float32))
    assert isinstance(got[1], tuple)


def test_weights_are_divided_by_their_sum_with_a_warning():
    with pytest.warns(UserWarning, match="sum to 4"):
        got = jasr.average([{"w": np.zeros(2)}, {"w": np.ones(2)}], [1, 3])
    np.testing.assert_array_equal(got["w"], np.full(2, 0.75))


@pytest.mark.parametrize(
    "weights, told",
    [
        ((0.5,), "1 weights for 2"),
        ((1.5, -0.5), "not negative"),
        ((float("nan"), 1), "finite"),
        ((float("inf"), 1), "finite"),
        ((0, 0), "all weights are 0"),
    ],
)
def test_unusable_weights_are_refused(weights, told):
    with pytest.raises(AverageError, match=told):
        jasr.average([{"w": np.zeros(2)}] * 2, weights)


def test_trees_that_do_not_agree_are_refused_with_every_difference():
    good = {"a": {"w": np.zeros((2, 3), np.float32), "v": np.zeros(2, np.float32)}}
    for leaf, told in (
        (np.zeros((3, 2), np.float32), r"~ a/w is \(3, 2\), wanted \(2, 3\)"),
        (np.zeros((2, 3), np.float16), "~ a/w is float16, wanted float32"),
    ):
        with pytest.raises(AverageError, match=told):
            jasr.average([good, {"a": good["a"] | {"w": leaf}}])
    with pytest.raises(AverageError, match=r"(?s)- a/v.*\+ a/u"):
        jasr.average([good, {"a": {"w": good["a"]["w"], "u": good["a"]["v"]}}])
    with pytest.raises(AverageError, match="nothing"):
        jasr.average([])


def test_integer_leaves_are_refused_by_name():
    trees = [{"w": np.zeros(2), "bn": {"num_batches_tracked": np.int64(3)}}] * 2
    with pytest.raises(AverageError, match="bn/num_batches_tracked of tree 0 is int64"):
        jasr.average(trees)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    trees = [{"m": {"w": np.zeros(200_000, np.float32)}} for _ in range(3)]
    trees[1]["m"]["w"][150_000] = bad
    with pytest.raises(AverageError, match="m/w of tree 1 has NaN or infinite"):
        jasr.average(trees)


def test_names_of_checkpoints_are_parsed():
    name = "step=14000-val_wer=0.0652-val_loss=1.50.ckpt"
    assert parse_name(name) == {"step": 14000, "val_wer": 0.0652, "val_loss": 1.5}
    assert parse_name("parakeet--val_wer=0.1234-epoch=5.ckpt") == {"val_wer": 0.1234, "epoch": 5.0}
    assert averaging.is_last("step=30000-val_wer=0.2000-last.ckpt")
    assert averaging.is_last("x-last-v1.ckpt") and averaging.is_last("30000-last")
    assert averaging.is_last("last.ckpt") and averaging.is_last("last-v12.ckpt")
    assert not averaging.is_last("blast.ckpt") and not averaging.is_last("last-step=3.ckpt")
    for text in ("1.5", "-3", "1e3"):
        assert parse_name(f"step={text}-val_wer=0.1.ckpt") == {"val_wer": 0.1}
    assert not averaging.is_last(name)


def test_weights_of_the_fork_and_of_nemo_come_out_on_its_checkpoints(shared_dir):
    torch = pytest.importorskip("torch")
    folder = shared_dir / "goldens" / "nemo" / "averaging"
    golden = np.load(folder / "averages.npz")
    names = [p.name for p in folder.glob("*.ckpt") if not averaging.is_last(p.name)]
    members = [
        averaging.Member(folder / n, v.pop("step"), v) for n in names for v in [parse_name(n)]
    ]
    chosen = select(members, top_n=3)
    assert [m.step for m in chosen] == [25000, 20500, 14000]
    trees = []
    for m in chosen:
        state = torch.load(m.path, weights_only=True)["state_dict"]
        trees.append({k: v.numpy() for k, v in state.items() if v.is_floating_point()})
    weights, how = weigh(chosen)
    assert how == "inverse val_wer"
    for prefix, w in (("seed000_inverse_wer", weights), ("nemo_script_equal", None)):
        got = jasr.average(trees, w)
        for k, v in got.items():
            want = golden[f"{prefix}/{k}"]
            np.testing.assert_allclose(v, want, rtol=1e-6, atol=1e-6, err_msg=f"{prefix} {k}")


# --- Checkpoints


def params_of(step):
    rng = np.random.default_rng(step)
    return {"model": {"kernel": rng.normal(size=(300, 40)).astype(np.float32)}}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("average") / "run"
    with checkpoint.Checkpoints(run / "checkpoints", keep_latest=4) as c:
        for step, wer in ((100, 0.4), (200, 0.2), (300, 0.1), (400, float("nan"))):
            state = {
                "params": params_of(step),
                "ema": {"model": {"kernel": params_of(step)["model"]["kernel"] * 2}},
                "batch_stats": {"norm": {"mean": np.full(3, step, np.float32)}},
                "opt_state": {"count": np.int32(step)},
            }
            meta = {"config": {"task": "ctc"}, "step": step}
            assert c.save(step, state, meta, {"val_wer": wer}, wait=True)
    return run


@pytest.fixture
def run(a_run, tmp_path):
    return shutil.copytree(a_run, tmp_path / "run")


def test_streamed_average_equals_the_one_in_memory_and_loads_like_a_step(run):
    members = select(find_members(run), top_n=2)
    weights, how = weigh(members)
    assert [m.step for m in members] == [300, 200] and how == "inverse val_wer"
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3])
    output = run / "average-top2"
    provenance = averaging.average_checkpoints(members, output, weights, how=how)
    assert provenance["item"] == "ema"
    want = jasr.average([checkpoint.load_params(m.path) for m in members], weights)
    same_bits(checkpoint.load_params(output)["model"]["kernel"], want["model"]["kernel"])
    stats = checkpoint.load_params(output, item="batch_stats")["norm"]["mean"]
    np.testing.assert_allclose(stats, np.full(3, 800 / 3), rtol=1e-6)
    assert checkpoint.items(output) == ["batch_stats", "params"]
    assert checkpoint.verify(output) == []
    meta = checkpoint.load_meta(output)
    assert meta["config"] == {"task": "ctc"} and meta["step"] == 300
    written = json.loads((output / averaging.PROVENANCE).read_text())
    assert meta["average"] == written == json.loads(json.dumps(provenance))
    assert [m["step"] for m in written["members"]] == [300, 200]
    assert [m["metrics"]["val_wer"] for m in written["members"]] == [0.1, 0.2]
    assert [s for s in checkpoint.find_steps(run)] == [100, 200, 300, 400]


def test_selection_by_steps_paths_and_names(run):
    members = find_members(run)
    assert [m.step for m in members] == [100, 200, 300, 400]
    assert [m.step for m in select(members, steps=(300, 100))] == [300, 100]
    with pytest.raises(AverageError, match=r"steps \[150\] are not there"):
        select(members, steps=(150, 100))
    with pytest.raises(AverageError, match="3 of 4 checkpoints have the metric"):
        select(members, top_n=4)
    with pytest.raises(AverageError, match="by top_n or by steps"):
        select(members)
    with pytest.raises(AverageError, match="top_n=-1: wanted"):
        select(members, top_n=-1)
    named = run / "named"
    for old, new in ((100, "step=100-val_loss=1.5"), (200, "step=200-val_loss=2.5-last")):
        shutil.copytree(run / "checkpoints" / str(old), named / new)
    (found,) = find_members(named)
    assert found.step == 100 and found.metrics == {"val_wer": 0.4, "val_loss": 1.5}
    assert averaging.member(run / "checkpoints" / "300").step == 300
    with pytest.raises(AverageError, match="no checkpoint in"):
        find_members(run / "nothing")


def test_weights_are_inverse_wer_where_all_have_one_else_equal(run):
    members = find_members(run)
    assert weigh(members)[1] == "equal"  # one is NaN
    assert weigh(members[:2], (0.3, 0.7)) == ([0.3, 0.7], "given")
    zero = [averaging.Member(m.path, m.step, {"val_wer": w}) for m, w in zip(members, (0, 0.1))]
    weights, _ = weigh(zero)
    assert 0.99 < weights[0] < 1


def test_one_checkpoint_twice_is_refused_even_as_a_copy(run):
    steps = run / "checkpoints"
    with pytest.raises(AverageError, match="the same checkpoint"):
        averaging.average_checkpoints([steps / "100", steps / "100"], run / "out")
    shutil.copytree(steps / "100", run / "100-copy")
    with pytest.raises(AverageError, match="the same checkpoint"):
        averaging.average_checkpoints([steps / "100", run / "100-copy"], run / "out")
    assert not (run / "out").exists()


def test_streaming_keeps_every_dtype(tmp_path):
    dtypes = {"d": np.float64, "s": np.float32, "h": np.float16, "b": ml_dtypes.bfloat16}
    for step in (1, 2):
        params = {k: np.full((3, 2), 1 + step / 3, t) for k, t in dtypes.items()}
        checkpoint.save_step(tmp_path / str(step), {"params": params}, step=step)
    averaging.average_checkpoints(find_members(tmp_path), tmp_path / "out")
    for k, leaf in checkpoint.load_params(tmp_path / "out").items():
        assert leaf.dtype == dtypes[k]
        np.testing.assert_allclose(leaf.astype(float), 1.5, rtol=5e-3)


def test_items_are_chosen_and_bad_ones_refused(run):
    steps = [run / "checkpoints" / s for s in ("100", "200")]
    averaging.average_checkpoints(steps, run / "out", item="params")
    want = jasr.average([params_of(100), params_of(200)])
    got = checkpoint.load_params(run / "out")
    same_bits(got["model"]["kernel"], want["model"]["kernel"])
    averaging.average_checkpoints(steps, run / "out", item="ema")  # replaces an average
    with pytest.raises(AverageError, match="no item 'frozen'"):
        averaging.average_checkpoints(steps, run / "out", item="frozen")
    with pytest.raises(AverageError, match="only floating-point"):
        averaging.average_checkpoints(steps, run / "out2", item="opt_state")
    with pytest.raises(AverageError, match="is not an average"):
        averaging.average_checkpoints(steps, run / "checkpoints" / "300")


def test_members_of_other_vocabularies_or_models_are_refused(tmp_path):
    plain = {"tokenizer": {"vocabulary": "ab"}, "config": {"model": {"lact_every": 2}}}
    metas = {
        1: plain | {"frozen_from": {"item": "ema", "sha256": "a", "path": "one/frozen"}},
        2: plain | {"tokenizer": {"vocabulary": "ba"}},
        3: plain | {"frozen_from": {"item": "ema", "sha256": "b", "path": "one/frozen"}},
        4: plain | {"config": {}},
        5: plain | {"config": {"model": {"lact_every": 2, "dropout": 0.5}}},
    }
    metas[4]["frozen_from"] = metas[1]["frozen_from"]
    metas[5]["frozen_from"] = metas[1]["frozen_from"] | {"path": "other/frozen"}
    for step, meta in metas.items():
        checkpoint.save_step(tmp_path / str(step), {"params": params_of(step)}, meta, step=step)
    for other, told in (
        (2, "differ in their tokenizer"),
        (3, "differ in their frozen_from"),
        (4, r"differ in config: model.lact_every \(2 -> 1\)"),
    ):
        with pytest.raises(AverageError, match=told):
            averaging.average_checkpoints([tmp_path / "1", tmp_path / str(other)], tmp_path / "o")
    averaging.average_checkpoints([tmp_path / "1", tmp_path / "5"], tmp_path / "o")


def test_a_damaged_member_is_refused(run):
    victim = run / "checkpoints" / "100" / "ema" / "manifest.ocdbt"
    victim.write_bytes(victim.read_bytes()[:-1])
    steps = [run / "checkpoints" / s for s in ("100", "200")]
    with pytest.raises(checkpoint.CheckpointError, match="ema/manifest.ocdbt has"):
        averaging.average_checkpoints(steps, run / "out")


def test_evaluation_prints_the_average_beside_its_members(run, root, capsys, monkeypatch):
    from experiments import average as command
    from jasr.recognition import report
    from jasr.systems import loading

    monkeypatch.setattr(loading, "load", lambda path, item: (str(path), item, {}))
    manifest = str(root / "tests" / "data" / "valid.jsonl")
    rates = {"100": 0.4, "300": 0.1, "average-100_300": 0.05}

    def evaluate(path, item, sources, meta):
        print("progress")
        name = path.rpartition("/")[2]
        assert sources == (manifest,) and item == ("" if "average" in name else "ema")
        return {"wer": rates[name], "cer": rates[name] / 2}

    monkeypatch.setattr(report, "evaluate", evaluate)
    arguments = ["--checkpoint_dir", str(run), "--steps", "100", "300"]
    assert command.main([*arguments, f"--evaluate={manifest}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == [
        ["step", "100", "40.00", "20.00"],
        ["step", "300", "10.00", "5.00"],
        ["average", "5.00", "2.50"],
    ]


def test_a_manifest_that_is_not_there_is_found_before_the_work(run, capsys):
    from experiments import average as command

    arguments = ["--checkpoint_dir", str(run), "--steps", "100", "300", "--evaluate=typo.jsonl"]
    assert command.main(arguments) == 1
    assert "typo.jsonl" in capsys.readouterr().err
    assert not (run / "average-100_300").exists()


def test_command_averages_the_best_of_a_run_and_says_what_went_in(run, capsys):
    from experiments import average as command

    assert command.main(["--checkpoint_dir", str(run), "--top_n=3"]) == 0
    told = capsys.readouterr().out
    assert f"{run}/average-top3: ema of 3 steps, weights: inverse val_wer" in told
    assert "0.5714 x step 300" in told
    assert checkpoint.verify(run / "average-top3") == []
    arguments = ["--checkpoint_dir", str(run), "--steps", "100", "300", "--weights", "0.3", "0.7"]
    assert command.main([*arguments, "--name=mine", "--item=params"]) == 0
    got = checkpoint.load_params(run / "average-mine")
    want = jasr.average([params_of(100), params_of(300)], [0.3, 0.7])
    same_bits(got["model"]["kernel"], want["model"]["kernel"])
    two = [str(run / "average-top3"), str(run / "checkpoints" / "100")]
    assert command.main(["--checkpoints", *two, "--output", str(run / "o"), "--item=params"]) == 0
    assert command.main(["--checkpoint_dir", str(run), "--steps", "100", "150"]) == 1
    assert "error: steps [150] are not there" in capsys.readouterr().err
    for flags, why in (
        ([], "needs --top_n or --steps"),
        (["--top_n=-1"], "--top_n: wanted 1 or more, got -1"),
        (["--top_n=2", "--name_prefix=x"], "--name_prefix does nothing for runs of jasr"),
        (["--top_n=2", "--ema"], "--ema does nothing for runs of jasr: say --item=ema"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--checkpoint_dir", str(run), *flags])
        assert why in capsys.readouterr().err
