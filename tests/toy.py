"""A system that exists in tests only: what the seam allows and today's systems do not need.

Dialogues: a line of a source has turns, each an item of two recordings (the two speakers) and what
is answered. Rows hold up to two turns and have three axes; a draw puts a word before an answer; the
cost of a row is quadratic in its tokens. The model is a recurrent language model on the loudness of
the two recordings; its loss is a sum of two ratios with divisors of their own; its tokenizer has no
blank. It is validated by perplexity and by generation, and transcribes without times. It listens
with the convolutions of a LaCT model, which a LaCT run can give it; its original is a directory of
two files, whose weights are stacked, cut and tied.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jasr import audio, seam, settings, text, tree
from jasr.data import recording
from jasr.data.config import DataError, ItemError
from jasr.interop import safetensors_file, table
from jasr.losses.reduction import contribution
from jasr.recognition import generation
from jasr.systems.lact.model import AudioFeatureExtractor
from jasr.systems.lact.settings import LactConfig
from jasr.training import validators

RATE, FRAME, MOST = 16000, 1600, 12  # Hz; samples of a window's frame; tokens that are generated


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The model's settings."""

    width: int = settings.field(8, least=1)
    noise: float = settings.field(0.0, least=0.0, meaning=False)
    ears: LactConfig = LactConfig()


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """The seam.Layout of "level" f32[B,A], the loudness of the pieces, and "tokens" i32[B,L]."""

    encode: Any
    greeting: int  # the token that a draw puts before an answer
    end: int  # the token that ends an answer

    axes, draws = ("samples", "tokens", "pieces"), True

    def items(self, values):
        turns = values.get("turns")
        if not isinstance(turns, list):
            raise DataError("missing key: turns")
        for n, turn in enumerate(turns):
            pieces = tuple(
                seam.Piece(p, seconds=s)
                for p, s in zip(turn["audio"], turn["seconds"], strict=True)
            )
            yield seam.Item(f"{values['id']}/{n}", pieces, {"text": turn["text"]})

    def sizes(self, item, scored):
        return sum(p.seconds for p in item.pieces), len(self.encode(item.fields["text"])) + 1, 2

    def for_set(self, seconds, exact):
        return self

    def drawn(self, sizes, words):
        found = np.ceil(sizes * [RATE, 1, 1]).astype(np.int64)
        found[:, 1] += 1 if words is None else (words[:, 0] % np.uint64(2)).astype(np.int64)
        return found, np.zeros_like(found)

    def cost(self, sizes):
        sizes = np.asarray(sizes)
        return sizes[..., 1].astype(float) ** 2 + sizes[..., 0] / RATE

    def label(self, bucket):
        return " x ".join(map(str, bucket))

    def empty(self, bucket):
        rows, _, tokens, pieces = bucket
        return {
            "level": np.zeros((rows, pieces), np.float32),
            "tokens": np.zeros((rows, tokens), np.int32),
            "token_len": np.zeros(rows, np.int32),
            "prompt_len": np.zeros(rows, np.int32),
            "index": np.full(rows, -1, np.int64),
        }

    def fill(self, batch, row, items, words):
        levels, tokens = [], []
        for n, (item, word) in enumerate(zip(items, words[:, 0].tolist(), strict=True)):
            try:
                sound = [recording.read(piece, RATE) for piece in item.pieces]
            except audio.AudioError as e:
                raise ItemError(n, recording.reason_of(e)) from e
            levels += [np.log(np.abs(x).mean() + 1e-4) for x in sound]
            tokens += [self.greeting] * (word % 2) + self.encode(item.fields["text"]) + [self.end]
        batch["level"][row, : len(levels)] = levels
        batch["tokens"][row, : len(tokens)], batch["token_len"][row] = tokens, len(tokens)


class Recurrent(nn.Module):
    """h' = tanh(h mix + table[token] + ears(loudness) listen), logits = h table' (tied)."""

    config: ToyConfig
    vocab: int

    def setup(self):
        width, draw = self.config.width, nn.initializers.normal(0.3)
        self.table = self.param("table", draw, (self.vocab, width))
        self.mix = self.param("mix", draw, (width, width))
        self.ears = AudioFeatureExtractor(self.config.ears)
        self.listen = self.param("listen", draw, (self.config.ears.hidden_size, width))
        self.loudness = self.param("loudness", nn.initializers.zeros, (2, width))

    def heard(self, level):
        """f32[B,D] of the loudnesses f32[B,A], each of which is a frame of equal bands."""
        mel = jnp.repeat(level[..., None], self.config.ears.n_mels, -1)
        length = jnp.full(level.shape[0], level.shape[1], jnp.int32)
        return self.ears(mel, length, False)[0].mean(1) @ self.listen

    def step(self, h, token, heard):
        """(h f32[B,D], logits f32[B,V]) after one more token i32[B]."""
        h = jnp.tanh(h @ self.mix + self.table[token] + heard)
        return h, h @ self.table.T

    def __call__(self, level, tokens):
        """(logits f32[B,L,V] of each next token, loudness f32[B,2] that is expected)."""
        heard, before = self.heard(level), jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        h, logits = jnp.zeros_like(heard), []
        for n in range(tokens.shape[1]):
            h, out = self.step(h, before[:, n], heard)
            logits.append(out)
        return jnp.stack(logits, 1), heard @ self.loudness.T


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """Training, validation and verbs of the toy; see `build`."""

    tokenizer: Any
    model: Recurrent

    token_parameters, heads = "table", ((), ())
    sharding = ((".*", ()),)

    @property
    def ids(self):
        """(id of the greeting, id of the end), behind those of the tokenizer; the end comes first
        in every answer's context, too."""
        return self.tokenizer.vocab_size, self.tokenizer.vocab_size + 1

    @property
    def layout(self):
        return Dialogues(self.tokenizer.encode, *self.ids)

    def check(self, buckets):
        pass

    def init(self, key, batch):
        variables = self.model.init(key, batch["level"], batch["tokens"])
        return {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    def counts(self, batch):
        rows = batch["index"] >= 0
        return {"tokens": jnp.where(rows, batch["token_len"], 0), "rows": rows}

    def divisors(self, batch):
        return {k: jnp.sum(v).astype(jnp.float32) for k, v in self.counts(batch).items()}

    def row_losses(self, variables, batch):
        """{name: (f32[B] values, f32[B] counts)}."""
        logits, loudness = self.model.apply(variables, batch["level"], batch["tokens"])
        own = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(own, batch["tokens"][..., None], -1)[..., 0]
        real = jnp.arange(own.shape[1]) < batch["token_len"][:, None]
        values = {
            "tokens": -jnp.sum(jnp.where(real, own, 0), 1),
            "rows": jnp.square(loudness - batch["level"][:, :2]).sum(1),
        }
        return {
            k: (values[k] * (n > 0), n.astype(jnp.float32)) for k, n in self.counts(batch).items()
        }

    def loss(self, variables, batch, divisors, keys, step):
        noise = jax.vmap(lambda k: jax.random.normal(k, batch["level"].shape[1:]))(
            audio.row_keys(keys["augment"], batch["index"])
        )
        noisy = {**batch, "level": batch["level"] + self.model.config.noise * noise}
        found = self.row_losses(variables, noisy)
        total = sum(contribution(v, n > 0, divisors[k]) for k, (v, n) in found.items())
        return total, (
            variables["batch_stats"],
            {"turns": jnp.sum(batch["index"] >= 0).astype(jnp.float32)},
        )

    def line(self, sums, seconds):
        return {"turns_per_s": sums["turns"] / seconds}

    @property
    def validators(self):
        return {
            "loss": validators.loss(self.row_losses),
            "perplexity": seam.Validator(("perplexity",), self.token_losses, perplexity),
            "answers": seam.Validator(("exact",), self.answers, self.exact),
        }

    def token_losses(self, variables, batch, key):
        value, count = self.row_losses(variables, batch)["tokens"]
        return {"value": value, "count": count}

    def answers(self, variables, batch, key):
        run = functools.partial(
            generation.generate, self.verbs["generate"], variables, batch, key=key, max_steps=MOST
        )
        found = run(until=lambda out: out["token"] == self.ids[1])
        return {"token": found.outputs["token"], "length": found.length}

    def exact(self, rows, items):
        said = {i: self.text(row["token"][: row["length"]]) for i, row in rows.items()}
        right = [said[i] == items[i].fields["text"] for i in rows]
        first = min(rows, default=None)
        return {"exact": float(np.mean(right)) if right else 0.0}, [f"Said: {said.get(first)}"]

    def text(self, ids):
        return self.tokenizer.decode([int(i) for i in ids if int(i) < self.tokenizer.vocab_size])

    # ---- verbs ----

    def start(self, variables, batch):
        heard = self.model.apply(variables, batch["level"], method="heard")
        first = jnp.zeros(heard.shape[0], jnp.int32)
        return {"h": jnp.zeros_like(heard), "heard": heard, "token": first}, {}

    def step(self, variables, state, inputs, keys):
        run = functools.partial(self.model.apply, variables, method="step")
        h, logits = run(state["h"], state["token"], state["heard"])
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return {**state, "h": h, "token": token}, {"token": token}

    def hear(self, variables, batch):
        """Windows of audio as answers, without times."""
        level = jnp.log(jnp.abs(batch["audio"]).mean(1) + 1e-4)
        rows = {"level": jnp.stack([level, level], 1), "index": jnp.arange(level.shape[0])}
        found = self.answers(variables, rows, jax.random.key(0))
        length = jnp.maximum(found["length"] - 1, 0)
        none = jnp.full_like(found["token"], -1)
        return {
            "tokens": found["token"], "start_frame": none, "end_frame": none, "token_len": length,
            "heard": -(-batch["audio_len"] // FRAME),
        }  # fmt: skip

    @property
    def verbs(self):
        decoder = seam.WindowDecoder(
            sample_rate=RATE, frame=FRAME, tokenizer=self.tokenizer, decode=self.hear,
            prepare=lambda variables: variables, window=lambda meta, trained: 30.0, text=self.text,
        )  # fmt: skip
        stepper = seam.Stepper({}, self.start, self.step, lambda out: self.text(out["token"]))
        return {"transcribe": decoder, "generate": stepper}


def perplexity(rows, items):
    """The exponential of the mean loss of a token."""
    sums = np.sum([[float(row["value"]), float(row["count"])] for row in rows.values()], axis=0)
    return {"perplexity": float(np.exp(sums[0] / max(sums[1], 1)))}, []


def build(config, tokenizer, ways):
    """The task of a run's config."""
    model = settings.build(ToyConfig, config["model"], "config.model")
    tokenizer = tokenizer.without_blank()
    return ToyTask(tokenizer, Recurrent(model, tokenizer.vocab_size + 2))


# ---- its original --------------------------------------------------------------------------------

FILES = ("words.safetensors", "cell.safetensors")
ROWS = (
    table.Row((r"embed\.weight", r"head\.weight"), "params/table"),
    table.Row(r"cell\.weight", ("params/mix", "params/listen"), "linear"),
    table.Row(r"sides\.(\d+)\.weight", "params/loudness"),
    table.Row(r"ears\.(.+)", r"params/ears/\1"),
    table.Row(r"ears_stats\.(.+)", r"batch_stats/ears/\1"),
)


def files(path, like=""):
    found = tuple(str(pathlib.Path(path) / name) for name in FILES)
    return found if pathlib.Path(found[0]).exists() else ()


def meta(path, like="", with_tokens=True):
    found = json.loads((pathlib.Path(path) / "toy.json").read_text())
    return {"config": {"task": "toy", **found["config"]}, "tokenizer": found["tokenizer"]}


def leaves(path, like=""):
    found = meta(path)
    task = build(found["config"], text.from_dict(found["tokenizer"]), 1)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), task.layout.empty((1, 0, 1, 2))))
    given = {k: x for file in files(path) for k, x in safetensors_file.read(file).items()}
    return tree.flatten(table.convert(ROWS, given, shapes, what=str(path)))


def write(path, meta, leaves, options):
    path = pathlib.Path(path)
    path.mkdir()
    weights = {k: np.asarray(x) for k, x in table.invert(ROWS, leaves).items()}
    words = [name for name in weights if name.startswith(("embed", "head"))]
    safetensors_file.write(path / FILES[0], {name: weights.pop(name) for name in words})
    safetensors_file.write(path / FILES[1], weights)
    kept = {"config": {"model": meta["config"]["model"]}, "tokenizer": meta["tokenizer"]}
    (path / "toy.json").write_text(json.dumps(kept))
    return ["a pair of files"]


PAIR = seam.Original("pair", ("_pair",), files, meta, leaves, write)


def recipe(mapping):
    """{"plaything": {"width", "rate"}} as a config."""
    if "plaything" not in mapping:
        return None
    names = {"width": "model.width", "rate": "optim.lr"}
    given = mapping["plaything"]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"plaything.{unknown[0]} is not known")
    return {names[name]: value for name, value in given.items()}, ["nothing else is read"]


SYSTEM = seam.System(
    name="toy",
    old_names=("plaything",),
    sections={"model": "tests.toy:ToyConfig"},
    task="tests.toy:build",
    originals={"pair": "tests.toy:PAIR"},
    parts={
        "ears": seam.Part(
            "ears", "model.ears", {"lact": ("model/audio_feature_extractor", "model")}
        )
    },
    options={},
    recipe=recipe,
)
