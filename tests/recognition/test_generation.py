"""Generation in one loop and step by step, by a language model that can be run by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jasr.decoding.sampling import sample
from jasr.recognition.generation import Live, emitted, generate
from jasr.seam import Stepper

V, END = 11, 0


def logits_of(variables, count, token):
    """The next token's logits depend on the last token and on how many there were."""
    return jnp.asarray(variables["table"])[(token + count) % V]


def start(variables, batch):
    """The state of prompts i32[B,L] of different lengths."""
    last = jnp.take_along_axis(batch["prompt"], batch["prompt_len"][:, None] - 1, axis=1)[:, 0]
    return {"count": batch["prompt_len"], "token": last}, batch["prompt_len"]


def step(variables, state, inputs, keys):
    count = jnp.where(inputs["fresh"], 1, state["count"])
    before = jnp.where(inputs["fresh"], 1, state["token"])
    token = sample(keys, logits_of(variables, count, before), inputs["temperature"], k=4)
    outputs = {"token": token, "last": inputs["last"]}
    return {"count": count + 1, "token": token}, outputs


STEPPER = Stepper({"temperature": ()}, start, step, lambda out: out["token"].tolist())
VARIABLES = {"table": np.random.default_rng(1).normal(size=(V, V)).astype(np.float32)}
PROMPTS = [[3, 5], [7], [1, 2, 3], [4]]


def batch_of(rows):
    width = max(len(PROMPTS[r]) for r in rows)
    prompt = np.array([np.pad(PROMPTS[r], (0, width - len(PROMPTS[r]))) for r in rows], np.int32)
    length = np.array([len(PROMPTS[r]) for r in rows], np.int32)
    return {"prompt": prompt, "prompt_len": length, "index": np.array(rows)}


def by_hand(row, most):
    token, count, said = PROMPTS[row][-1], len(PROMPTS[row]), []
    while len(said) < most:
        token = int(np.argmax(logits_of(VARIABLES, count, token)))
        count += 1
        said.append(token)
        if token == END:
            break
    return said


@jax.jit
def run(batch, temperature, steps=None):
    return generate(
        STEPPER, VARIABLES, batch, key=jax.random.key(0), max_steps=12, steps=steps,
        until=lambda out: out["token"] == END, inputs=lambda n: {"temperature": temperature},
    )  # fmt: skip


def test_rows_end_on_their_own_as_by_hand():
    found = run(batch_of([0, 1, 2, 3]), 0.0)
    said = emitted(STEPPER, found)
    assert said == [by_hand(row, 12) for row in range(4)]
    assert len({len(x) for x in said}) > 1
    assert found.ended.tolist() == [x[-1] == END for x in said]
    assert found.prompt.tolist() == [2, 1, 3, 1]
    for row, x in enumerate(said):
        assert not np.any(found.outputs["token"][row, len(x) :])


def test_a_row_has_its_own_number_of_steps_and_padding_has_none():
    batch = batch_of([0, 1, 2, 3])
    batch["index"][3] = -1
    found = run(batch, 0.0, np.array([1, 3, 2, 5]))
    assert found.length.tolist() == [len(by_hand(r, n)) for r, n in enumerate((1, 3, 2))] + [0]
    for row, length in enumerate(found.length[:3].tolist()):
        last = found.outputs["last"][row].tolist()
        assert last[: length - 1] == [False] * (length - 1)
        assert last[length - 1] == (not found.ended[row])


def test_drawn_tokens_do_not_depend_on_the_other_rows():
    together = emitted(STEPPER, run(batch_of([0, 1, 2, 3]), 1.0))
    turned = emitted(STEPPER, run(batch_of([2, 0, 3, 1]), 1.0))
    assert together == [turned[n] for n in (1, 3, 0, 2)]
    assert together != [by_hand(row, 12) for row in range(4)]


def test_step_by_step_is_the_same_and_rows_may_begin_anew():
    batch = batch_of([0, 1, 2, 3])
    want = emitted(STEPPER, run(batch, 1.0))
    live = Live(STEPPER, VARIABLES, batch, jax.random.key(0))
    hot = {"temperature": np.float32(1.0)}
    steps = [live.step(hot) for _ in range(max(map(len, want)))]
    for row, tokens in enumerate(want):
        assert [token for said in steps[: len(tokens)] for token in said[row]] == tokens
    cold = {"temperature": np.float32(0.0)}
    begun = live.step(cold, fresh=[2], last=[1])
    assert begun[2] == [int(np.argmax(logits_of(VARIABLES, 1, 1)))]
