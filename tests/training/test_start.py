"""What a run starts from: parts of several origins, drawn leaves, frozen ones named or written."""

import functools
import re
import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import checkpoint, tree
from jasr.systems import catalogue, loading, source
from jasr.systems.fastconformer import SYSTEM
from jasr.training import start
from tests.systems.fastconformer.test_task import TOKENIZER, config


@functools.cache
def drawn(kind, seed=0):
    """(config, task, variables) of a tiny model of random numbers."""
    plain = config(kind)
    task = loading.build(plain, TOKENIZER)
    batch = task.layout.empty((2, 16000, 4))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)
    return plain, task, variables


def saved(folder, kind, **more):
    plain, _, variables = drawn(kind)
    meta = {"config": plain, "tokenizer": TOKENIZER.to_dict(), "task": plain["task"], **more}
    loading.save(folder, meta, variables)
    return folder


@flax.struct.dataclass
class State:
    params: dict
    frozen: dict
    batch_stats: dict
    ema: dict
    step: jax.Array


def state_of(variables, frozen):
    rest, ours = tree.split(variables["params"], frozen)
    return State(ours, rest, variables["batch_stats"], ours, jnp.int32(0))


def placed(shapes):
    """The shapes with a sharding each, on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)


def begun(kind, path, folder, **init):
    """(state, origins, wanted variables, frozen paths) of a run that starts from `path`."""
    plain, task, variables = drawn(kind, 1)
    given = start.init_config({"path": path, **init})
    found = start.origins(given, plain)
    paths = set(tree.flatten(variables["params"]))
    for origin in found:
        start.check_source(origin, given, task, paths, plain)
    frozen = start.frozen_paths(variables["params"], given.freeze)
    leaves = start.given_leaves(found, given, variables)
    found, leaves = start.keep(found, leaves, frozen, folder)
    known = {p: x for given in leaves for p, x in given.items()}

    def fresh():
        return state_of(jax.tree.map(jnp.asarray, variables), frozen)

    shapes = placed(jax.eval_shape(fresh))
    return start.state_from(fresh, shapes, known), found, variables, frozen, shapes


def test_a_part_comes_from_another_model_and_the_rest_is_drawn(tmp_path):
    path = saved(tmp_path / "ctc", "ctc")
    for given in (f"encoder={path}", (("encoder", str(path)),)):
        state, found, variables, _, _ = begun("rnnt", given, tmp_path)
        theirs = drawn("ctc")[2]["params"]["encoder"]
        for name, want in (("encoder", theirs), ("joint", variables["params"]["joint"])):
            for got in (state.params, state.ema):
                jax.tree.map(np.testing.assert_array_equal, got[name], want)
    assert [origin["part"] for origin in found] == ["encoder"]


def test_a_part_is_compared_by_its_own_settings(tmp_path):
    plain = config("ctc")
    plain["model"]["encoder"]["xscaling"] = not plain["model"]["encoder"]["xscaling"]
    path = saved(tmp_path / "other", "ctc", config=plain)
    with pytest.raises(start.StartError, match=r"trained otherwise: model.encoder.xscaling \("):
        begun("rnnt", f"encoder={path}", tmp_path)
    whole = saved(tmp_path / "ctc", "ctc")
    with pytest.raises(start.StartError, match="trained otherwise: model.kind"):
        begun("rnnt", str(whole), tmp_path)


def test_a_part_of_a_system_that_cannot_give_it_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "run", "ctc")
    monkeypatch.setattr(catalogue, "today", lambda name: "lact")
    monkeypatch.setattr(catalogue, "get", lambda name: SYSTEM)
    given = start.init_config({"path": f"encoder={path}"})
    with pytest.raises(start.StartError, match="part 'encoder' comes from fastconformer; .* lact"):
        start.origins(given, config("ctc"))


def test_paths_with_equal_signs_are_paths_unless_a_part_is_named():
    path = "runs/step=3-val_wer=0.1.ckpt"
    assert start.given_paths(path, ("encoder",)) == (("", path),)
    assert start.given_paths(f"encoder={path}, llm=a,b", ("encoder", "llm")) == (
        ("encoder", path),
        ("llm", "a,b"),
    )


def test_freezing_has_exceptions_and_the_first_rule_says():
    params = {"a": {"w": 0, "lora": 1}, "b": 2}
    rules = ((".*/lora", False), "a/.*")
    assert start.frozen_paths(params, rules) == {"a/w"}
    assert start.frozen_paths(params, rules[1:]) == {"a/w", "a/lora"}


def test_frozen_leaves_of_an_origin_are_named_and_drawn_ones_are_written(tmp_path):
    path = saved(tmp_path / "ctc", "ctc")
    rules = ("encoder/pre_encode/.*", "joint/.*")
    state, found, _, frozen, shapes = begun(
        "rnnt", f"encoder={path}", tmp_path / "run", freeze=rules
    )
    meta = {"frozen_from": start.frozen_from(found)}
    named = set(meta["frozen_from"]["leaves"])
    assert named == {p for p in frozen if p.startswith("encoder/")} and named < frozen
    written = start.written_of(frozen, meta)
    assert written == {p for p in frozen if p.startswith("joint/")} and written
    items = {"params": state.params, "frozen": tree.split(state.frozen, written)[0]}
    checkpoint.save_step(tmp_path / "run" / "checkpoints" / "1", items, meta)
    kept = tmp_path / "run" / "frozen_from-encoder"
    assert source.locate(meta["frozen_from"], tmp_path / "run")["path"] == str(kept)
    got = source.leaves(source.resolve(tmp_path / "run"))
    want = {**tree.flatten(state.params), **tree.flatten(state.frozen)}
    assert {p for p in got if p.startswith("params/")} == {f"params/{p}" for p in want}
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[f"params/{name}"], leaf)
    back, _ = start.read_frozen(meta, shapes.frozen, tmp_path / "run")
    assert set(back) == named
    for name, leaf in back.items():
        np.testing.assert_array_equal(leaf, want[name])


def test_steps_of_earlier_revisions_wrote_all_frozen_parameters_or_none():
    assert start.written_of({"a", "b"}, {"frozen_from": {}}) == {"a", "b"}
    assert start.written_of({"a", "b"}, {"frozen_from": {"path": "x"}}) == frozenset()


def test_files_of_an_origin_are_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"weights")
    hashed = []
    original = types.SimpleNamespace(
        files=lambda path, like: (path,), leaves=lambda path, like: {}, meta=lambda *a: {}
    )
    monkeypatch.setattr(source, "find", lambda path, like="": original)
    real = source._digest
    monkeypatch.setattr(source, "_digest", lambda files: hashed.append(1) or real(files))
    origin = source.resolve(path)
    source.leaves(origin)
    source.leaves(origin)
    assert hashed == [1]
    path.write_bytes(b"Weights")
    with pytest.raises(checkpoint.CheckpointError, match="checksum changed"):
        source.leaves(origin | {"files": {}})


def test_only_what_is_drawn_is_compiled():
    shapes = placed({"params": {n: jax.ShapeDtypeStruct((64, 64), np.float32) for n in "ab"}})
    texts, traced = [], []

    def fresh():
        traced.append(1)
        keys = jax.random.split(jax.random.key(0))
        return {"params": {n: jax.random.normal(k, (64, 64)) for n, k in zip("ab", keys)}}

    real = jax.jit

    def watched(fn, **options):
        made = real(fn, **options)
        texts.append(made.lower().compile().as_text())
        return made

    whole = start.state_from(fresh, shapes, {})["params"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(start.jax, "jit", watched)
        given = {"params/a": np.ones((64, 64), np.float16)}
        state = start.state_from(fresh, shapes, given)["params"]
    assert len(traced) == 2  # once a state
    np.testing.assert_array_equal(state["b"], whole["b"])
    assert state["a"].dtype == np.float32 and (np.asarray(state["a"]) == 1).all()
    assert len(re.findall(r"f32\[64,64\]", texts[0].split("ENTRY")[1].split("\n")[0])) == 1
