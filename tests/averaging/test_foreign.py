"""Averages of NeMo's .ckpt files: the goldens, ties, drift, copies, memory."""

import shutil
import tarfile
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from jasr import averaging
from jasr.averaging import AverageError
from jasr.averaging import foreign as fa
from jasr.interop import nemo_archive, torch_file

STEPS = [14000, 20500, 25000]


@pytest.fixture(params=["reduced", "whole"])
def folder(request, goldens):
    """The golden checkpoints: a dozen tensors of each, or, beside the checkout, all of them."""
    if request.param == "reduced":
        return goldens / "nemo" / "optim" / "averaging"
    return request.getfixturevalue("shared_dir") / "goldens" / "nemo" / "averaging"


def save(path, state, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_file.write(path, {"state_dict": state} | more)
    return path


def normal(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# ---- choosing ------------------------------------------------------------------------------------


def test_files_are_found_by_name_and_weighed_as_the_goldens_say(folder):
    golden = np.load(folder / "averages.npz")
    members = fa.find_files(folder)
    assert [m.step for m in members] == STEPS  # without -last
    assert [m.metrics["val_wer"] for m in members] == [0.0652, 0.0611, 0.0587]
    weights, how = averaging.weigh(members)
    np.testing.assert_allclose(weights, golden["seed000/inverse_wer_weights"], rtol=1e-12)
    best = averaging.select(members, top_n=2)
    assert [members.index(m) for m in best] == list(golden["seed000/top2_indices"])
    np.testing.assert_allclose(averaging.weigh(best)[0], golden["seed000/top2_weights"])
    with pytest.warns(UserWarning, match="sum to 10"):
        given, how = averaging.weigh(members, golden["seed000/custom_weights_in"])
    np.testing.assert_allclose(given, golden["seed000/custom_weights_normalised"])
    assert averaging.best_of(members).step == 25000
    chosen = averaging.select(members, steps=(20500, 14000))
    assert [m.step for m in chosen] == [20500, 14000]


def test_ema_files_averages_and_names_without_steps(tmp_path):
    state = {"w": normal((2,), 0)}
    for name in ("step=10-val_wer=0.5", "step=20-val_wer=0.4", "step=20-val_wer=0.4-last"):
        save(tmp_path / f"{name}.ckpt", state, epoch=name)
        save(tmp_path / f"{name}-EMA.ckpt", state, epoch=name)
    save(tmp_path / "other.ckpt", state, global_step=15)
    for name in ("model-averaged", "best-step=20-averaged"):  # NeMo's script names them so
        save(tmp_path / f"{name}.ckpt", state)
    for name in ("last", "last-v1", "last-EMA"):  # Lightning's
        save(tmp_path / f"{name}.ckpt", state, global_step=20)
    (tmp_path / "folder.ckpt").mkdir()
    average = fa.average_files(fa.find_files(tmp_path))
    fa.write_ckpt(tmp_path / "mean.ckpt", average)
    fa.write_ckpt(tmp_path / "soup-step=30-val_wer=0.1.ckpt", average)
    assert [m.step for m in fa.find_files(tmp_path)] == [10, 15, 20]
    emas = fa.find_files(tmp_path, ema=True)
    assert [m.path.name.endswith("-EMA.ckpt") for m in emas] == [True, True]
    with pytest.raises(AverageError, match="no .ckpt file.*--ema"):
        fa.find_files(tmp_path / "folder.ckpt")
    with pytest.raises(AverageError, match="no -EMA.ckpt file"):
        fa.find_files(tmp_path / "folder.ckpt", ema=True)


def test_a_step_that_is_no_whole_number_is_the_files_own(tmp_path):
    path = save(tmp_path / "step=1.5-val_wer=0.1.ckpt", {"w": normal((2,), 0)}, global_step=15)
    assert fa.find_files(tmp_path) == [averaging.Member(path, 15, {"val_wer": 0.1})]


def test_a_damaged_file_is_told_when_it_is_chosen(tmp_path):
    path = save(tmp_path / "step=1.ckpt", {"w": normal((2,), 0)})
    (tmp_path / "step=2.ckpt").write_bytes(path.read_bytes()[:-9])
    found = fa.find_files(tmp_path)
    assert fa.average_files(averaging.select(found, steps=(1,))).best.step == 1
    with pytest.raises(torch_file.TorchFileError, match="step=2.ckpt: a cut or damaged"):
        fa.average_files(found)


def test_the_best_is_the_newest_where_a_metric_is_missing(tmp_path):
    members = [
        averaging.Member(tmp_path, 1, {"val_wer": 0.1}),
        averaging.Member(tmp_path, 3, {}),
        averaging.Member(tmp_path, 2, {}),
    ]
    assert averaging.best_of(members).step == 3
    assert averaging.best_of(members[:1]).step == 1
    scores = [averaging.Member(tmp_path, i, {"bleu": b}) for i, b in enumerate((3.0, 9.0, 4.0))]
    assert averaging.best_of(scores, "bleu", "max").step == 1


# ---- averaging -----------------------------------------------------------------------------------


def test_averages_are_those_of_nemo_and_of_the_inverse_word_error_rates(folder, tmp_path):
    golden = np.load(folder / "averages.npz")
    members = fa.find_files(folder)
    weights, how = averaging.weigh(members)
    weighted = fa.average_files(members, weights, how=how)
    summed = fa.average_files(members, integers="sum")  # NeMo's script adds counters up
    for prefix, got in (("seed000_inverse_wer", weighted), ("nemo_script_equal", summed)):
        want = {k.removeprefix(f"{prefix}/"): golden[k] for k in golden if k.startswith(prefix)}
        assert set(want) <= set(got.state) and len(want) > 10
        for key, value in want.items():
            assert got.state[key].dtype == value.dtype
            np.testing.assert_allclose(got.state[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    counter = "encoder.layers.0.conv.batch_norm.num_batches_tracked"
    best = torch_file.read(members[2].path)["state_dict"]
    assert list(weighted.state) == list(best)
    assert weighted.state[counter] == best[counter] and summed.state[counter] == 303
    assert weighted.best == members[2]
    assert weighted.provenance["weights_from"] == "inverse val_wer"
    assert [m["step"] for m in weighted.provenance["members"]] == STEPS

    fa.write_ckpt(tmp_path / "mean.ckpt", weighted)
    saved = torch_file.read(tmp_path / "mean.ckpt")
    assert (saved["global_step"], saved["epoch"]) == (25000, 2)
    assert saved[fa.CKPT_KEY] == weighted.provenance
    for key, value in weighted.state.items():
        assert saved["state_dict"][key].tobytes() == value.tobytes()


def test_equal_files_come_out_bit_for_bit_in_their_dtypes(tmp_path):
    state = {
        "f32": normal((3, 4), 0),
        "bf16": normal((5,), 1, ml_dtypes.bfloat16),
        "f16": normal((5,), 1, np.float16),
        "f64": normal((5,), 1, np.float64),
        "count": np.int64(7) * np.ones((), np.int64),
        "mask": np.array([True, False]),
        "layer._extra_state": normal((2,), 5),
        "nothing": None,
    }
    paths = [save(tmp_path / f"step={i}.ckpt", state, epoch=i) for i in range(3)]
    got = fa.average_files(paths, [0.2, 0.3, 0.5]).state
    for key, value in state.items():
        if value is None:
            assert got[key] is None
        else:
            assert got[key].dtype == value.dtype and got[key].tobytes() == value.tobytes()


def test_what_has_no_mean_comes_from_the_best(tmp_path):
    states = [
        {"w": np.float32([i]), "count": np.int64([i]), "a._extra_state": np.zeros(i + 1, np.uint8)}
        for i in range(3)
    ]
    states[1]["b._extra_state"] = np.zeros(3, np.uint8)  # in one member only
    paths = [
        save(tmp_path / f"step={i}-val_wer={w}.ckpt", s)
        for i, (s, w) in enumerate(zip(states, (0.3, 0.1, 0.2), strict=True))
    ]
    average = fa.average_files(paths)
    assert average.state["w"] == 1 and average.state["count"] == 1
    assert average.state["a._extra_state"].shape == (2,) and "b._extra_state" in average.state
    assert fa.average_files(paths, integers="sum").state["a._extra_state"].shape == (2,)
    last = fa.average_files(paths, best=fa.file_member(paths[2])).state
    assert last["count"] == 2


def test_tied_tensors_stay_tied(tmp_path):
    torch = pytest.importorskip("torch")
    for seed in range(2):
        w = torch.tensor(normal((4, 3), seed))
        state = {"embed.weight": w, "head.weight": w, "view": w[:2], "other": w.clone()}
        torch.save({"state_dict": state}, tmp_path / f"step={seed}.ckpt")
    state = fa.average_files(fa.find_files(tmp_path)).state
    assert state["embed.weight"] is state["head.weight"]
    assert state["embed.weight"] is not state["other"]
    np.testing.assert_array_equal(state["embed.weight"], state["other"])
    np.testing.assert_array_equal(state["embed.weight"][:2], state["view"])
    # in one of the files they are two
    state = {"embed.weight": w, "head.weight": w.clone(), "view": w[:2], "other": w}
    torch.save({"state_dict": state}, tmp_path / "step=7.ckpt")
    state = fa.average_files(fa.find_files(tmp_path)).state
    assert state["embed.weight"] is not state["head.weight"]


def test_lightning_files_of_torch_keep_what_builds_the_model(tmp_path):
    torch = pytest.importorskip("torch")
    for seed in range(2):
        torch.save(
            {
                "state_dict": {"w": torch.tensor(normal((3,), seed))},
                "epoch": seed,
                "global_step": 10 * seed,
                "pytorch-lightning_version": "2.4.0",
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
                "hparams_name": "cfg",
                "hyper_parameters": {"cfg": {"encoder": {"d_model": 8}, "labels": ["a", "b"]}},
            },
            tmp_path / f"model-{seed}.ckpt",
        )
    average = fa.average_files(fa.find_files(tmp_path))
    fa.write_ckpt(tmp_path / "out.ckpt", average)
    back = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert back["hyper_parameters"] == {"cfg": {"encoder": {"d_model": 8}, "labels": ["a", "b"]}}
    assert (back["epoch"], back["global_step"], back["hparams_name"]) == (1, 10, "cfg")
    assert "optimizer_states" not in back
    np.testing.assert_array_equal(back["state_dict"]["w"].numpy(), average.state["w"])


def test_hyper_parameters_that_are_no_data_are_left_out_with_a_warning(tmp_path):
    torch = pytest.importorskip("torch")
    saved = {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"where": tmp_path}}
    torch.save(saved, tmp_path / "step=1.ckpt")
    average = fa.average_files([tmp_path / "step=1.ckpt"])
    with pytest.warns(UserWarning, match="hyper_parameters of .*step=1.ckpt"):
        fa.write_ckpt(tmp_path / "out.ckpt", average)
    assert "hyper_parameters" not in torch_file.read(tmp_path / "out.ckpt")


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("b"), r"step=2.ckpt beside .*step=1.ckpt.*(?s:.*)- b \(2,\)"),
        (lambda s: s.update(c=s["b"]), r"\+ c \(2,\)"),
        (lambda s: s.update(b=s["b"][:1]), r"~ b is \(1,\), wanted \(2,\)"),
        (lambda s: s.update(b=s["b"].astype(np.float16)), "~ b is float16, wanted float32"),
        (lambda s: s.update(n=s["n"].astype(np.int32)), "~ n is int32, wanted int64"),
        (lambda s: s.update(b=np.float32([1, np.nan])), "b of .*step=2.ckpt has NaN"),
        (lambda s: s.update(a=np.float32([[np.inf]])), "a of .*step=2.ckpt has NaN or infinite"),
    ],
)
def test_files_that_do_not_agree_are_refused_by_name(tmp_path, change, told):
    state = {"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32), "n": np.int64([3])}
    other = dict(state)
    change(other)
    paths = [save(tmp_path / "step=1.ckpt", state), save(tmp_path / "step=2.ckpt", other)]
    with pytest.raises(AverageError, match=told):
        fa.average_files(paths)


def test_one_file_twice_and_files_without_weights_are_refused(tmp_path):
    path = save(tmp_path / "step=1.ckpt", {"w": np.ones(2, np.float32)})
    (tmp_path / "link.ckpt").symlink_to(path)
    with pytest.raises(AverageError, match="same checkpoint"):
        fa.average_files([path, tmp_path / "link.ckpt"])
    shutil.copy(path, tmp_path / "step=1-v1.ckpt")
    with pytest.raises(AverageError, match="step=1.ckpt is the same checkpoint as .*-v1.ckpt"):
        fa.average_files([tmp_path / "step=1-v1.ckpt", path])
    torch_file.write(tmp_path / "step=2.ckpt", {"epoch": 3})
    with pytest.raises(AverageError, match="step=2.ckpt holds no state dict"):
        fa.average_files([path, tmp_path / "step=2.ckpt"])
    torch_file.write(tmp_path / "step=3.ckpt", [1])
    with pytest.raises(AverageError, match="step=3.ckpt holds a list"):
        fa.average_files([path, tmp_path / "step=3.ckpt"])
    with pytest.raises(ValueError, match="integers"):
        fa.average_files([path], integers="mean")


def test_copies_are_told_from_files_of_the_same_size(tmp_path):
    block = 1 << 20
    for name, change in (("a", None), ("b", 0), ("c", block - 1), ("d", block), ("e", 2 * block)):
        data = bytearray(2 * block + 5)
        if change is not None:
            data[change] = 1
        (tmp_path / name).write_bytes(data)
    members = [averaging.Member(tmp_path / name, 0, {}) for name in "abcde"]
    averaging.check_once(members)
    for size in (block, 2 * block + 5):
        (tmp_path / "f").write_bytes(bytes(size))
        (tmp_path / "g").write_bytes(bytes(size))
        copies = [averaging.Member(tmp_path / name, 0, {}) for name in "fg"]
        with pytest.raises(AverageError, match="g is the same checkpoint as .*f;"):
            averaging.check_once(copies)


def test_memory_is_that_of_one_result(tmp_path):
    shapes = {f"layer{i}.weight": (512, 512) for i in range(12)}
    paths = [
        save(tmp_path / f"step={s}.ckpt", {k: normal(n, s) for k, n in shapes.items()})
        for s in range(4)
    ]
    result = sum(4 * np.prod(s) for s in shapes.values())
    tracemalloc.start()
    try:
        average = fa.average_files(paths)
        fa.write_ckpt(tmp_path / "out.ckpt", average)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * result


# ---- .nemo ---------------------------------------------------------------------------------------


def test_weights_go_into_an_archive_and_nothing_else_changes(tmp_path):
    state = {"enc.weight": normal((3, 4), 0), "enc.bias": normal((3,), 1)}
    weights = save(tmp_path / "w" / "model_weights.ckpt", {})
    torch_file.write(weights, state)
    big = bytes(range(256)) * 9000
    members = {"model_config.yaml": b"target: x\n", "model_weights.ckpt": str(weights),
               "0123_tokenizer.model": big}  # fmt: skip
    nemo_archive.write(tmp_path / "in.nemo", members)
    new = {"enc.bias": normal((3,), 2), "enc.weight": normal((3, 4), 3)}  # another order
    fa.write_nemo(tmp_path / "out.nemo", new, tmp_path / "in.nemo")
    with tarfile.open(tmp_path / "in.nemo") as old, tarfile.open(tmp_path / "out.nemo") as out:
        assert out.getnames() == old.getnames()
        assert out.extractfile("./0123_tokenizer.model").read() == big
        assert out.extractfile("./model_config.yaml").read() == b"target: x\n"
        content = out.extractfile("./model_weights.ckpt").read()
    (tmp_path / "back.ckpt").write_bytes(content)
    back = torch_file.read(tmp_path / "back.ckpt")
    assert list(back) == list(state)
    for key, value in new.items():
        np.testing.assert_array_equal(back[key], value)
    for wrong in ({"enc.weight": new["enc.weight"]}, new | {"more": np.ones(2)},
                  new | {"enc.bias": np.ones(4)}):  # fmt: skip
        with pytest.raises(AverageError, match="in.nemo does not fit"):
            fa.write_nemo(tmp_path / "bad.nemo", wrong, tmp_path / "in.nemo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.ckpt", "in.nemo", "out.nemo", "w"]


def test_the_golden_archive_takes_the_average(shared_dir, tmp_path):
    folder = shared_dir / "goldens" / "nemo" / "averaging"
    average = fa.average_files(fa.find_files(folder), integers="sum")
    fa.write_nemo(tmp_path / "mean.nemo", average.state, folder / "base.nemo")
    golden = np.load(folder / "averages.npz")
    with nemo_archive.opened(tmp_path / "mean.nemo") as archive:
        start, size = archive.member(nemo_archive.WEIGHTS)
        back = torch_file.read(archive.tar, start=start, size=size)
        assert {f"nemo_script_equal/{k}" for k in back} <= set(golden)
        for key, value in back.items():
            want = golden[f"nemo_script_equal/{key}"]
            np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)
