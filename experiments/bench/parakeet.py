"""FastConformer beside transformers' Parakeet and NeMo: encoder forward, or a CTC training step.

    python -m experiments.benchmark parakeet                               # encoder, 110M, 4 x 10 s
    python -m experiments.benchmark parakeet --batch=1 --seconds=30
    python -m experiments.benchmark parakeet --part=step                   # CTC training step
    python -m experiments.benchmark parakeet --size=tiny --nemo_python=.nemo-venv/bin/python

A CTC model of random weights is written once, as a Hugging Face directory and as a .nemo, and every
side loads the same weights. `encoder`: log-mel frames to encoder frames. `step`: from log-mel
frames, CTC loss, gradients and AdamW (PyTorch's fused one), in training mode with every dropout 0.
Outputs, or the losses of the first step, are compared first; each side runs in a process of its
own, in turns. `--size` sets the model, which its other options change.
"""

import atexit
import pathlib
import tempfile

import numpy as np

from experiments.bench import models, timing

SIZES = {
    "tiny": dict(layers=2, d_model=64, heads=4, channels=32),
    "small": dict(layers=16, d_model=176, heads=4, channels=176),
    "110m": dict(layers=17, d_model=512, heads=8, channels=256),
}
LEARNING_RATE = 1e-3


def main(argv=None):
    numbers = dict(mels=80, vocabulary=1024, batch=4, seconds=10.0, shortest=0.75, rounds=11)
    parser = timing.parser("parakeet", __doc__, **numbers)
    parser.add_argument("--part", choices=("encoder", "step"), default="encoder")
    parser.add_argument("--size", choices=SIZES, default="110m")
    for name in SIZES["tiny"]:
        parser.add_argument(f"--{name}", type=int, help="of the model, in place of the size's")
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    args = parser.parse_args(argv)
    for name, value in SIZES[args.size].items():
        setattr(args, name, getattr(args, name) or value)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder)


def write(args, folder):
    """Writes the model both ways and the inputs; the number of parameters."""
    import jax

    from jasr import tree

    encoder = dict(
        feat_in=args.mels,
        n_layers=args.layers,
        d_model=args.d_model,
        n_heads=args.heads,
        subsampling_conv_channels=args.channels,
        dropout=0.0,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
        dropout_att=0.0,
    )
    sections = {"front_end": {"n_mels": args.mels}, "loss": {"kind": "ctc", "reduction": "mean"}}
    task, meta = models.build({"kind": "ctc", "encoder": encoder}, args.vocabulary, **sections)
    variables = jax.jit(task.model.init)(jax.random.key(0), *models.sample(task))
    leaves = tree.flatten(jax.tree.map(np.asarray, dict(variables)))
    models.write(folder, meta, leaves, ("hf", *(["nemo"] if args.nemo_python else [])))
    frames = int(100 * args.seconds)
    rng = np.random.default_rng(0)
    length = (np.linspace(args.shortest, 1, args.batch)[::-1] * frames).astype(np.int32)
    mel = rng.standard_normal((args.batch, frames, args.mels), dtype=np.float32)
    np.savez(
        f"{folder}/inputs.npz",
        mel=np.where(np.arange(frames)[:, None] < length[:, None, None], mel, 0),
        mel_len=length,
        tokens=rng.integers(1, args.vocabulary, (args.batch, max(1, int(4 * args.seconds)))),
        token_len=(length // 25).clip(1),
    )
    return tree.count(variables["params"])


# ---- the sides: thunk -> {name: array} -----------------------------------------------------------


def jasr_side(args, folder):
    import jax
    import optax

    from jasr.losses.ctc import ctc_loss
    from jasr.losses.reduction import contribution, scale_and_count
    from jasr.systems import loading

    task, variables, _ = loading.load(f"{folder}/model.hf")
    inputs = dict(np.load(f"{folder}/inputs.npz"))
    variables, inputs = jax.device_put((variables, inputs))
    apply = task.model.apply
    if args.part == "encoder":
        encode = jax.jit(lambda v, mel, n: apply(v, mel, n, method="encode"))

        def forward():
            encoded, length = encode(variables, inputs["mel"], inputs["mel_len"])
            return {"encoded": jax.block_until_ready(encoded), "encoded_len": length}

        return forward

    tx = optax.adamw(LEARNING_RATE, weight_decay=0.0)

    def loss_of(params, stats, x):
        (encoded, length), changed = apply(
            {"params": params, "batch_stats": stats},
            x["mel"],
            x["mel_len"],
            train=True,
            method="encode",
            mutable=["batch_stats"],
        )
        logits = apply({"params": params}, encoded, method="ctc_logits")
        tokens, token_len = x["tokens"], x["token_len"]
        losses, good = ctc_loss(logits, length, tokens, token_len, blank=task.config.blank)
        scale, count = scale_and_count(token_len, good, "mean")
        return contribution(losses, scale, count.sum()), changed["batch_stats"]

    def step(state, x):
        params, stats, opt_state = state
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    state = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    program = jax.jit(step, donate_argnums=0).lower(state, inputs).compile()
    box = [state]

    def train():
        box[0], loss = program(box[0], inputs)
        return {"loss": jax.block_until_ready(loss)}

    return train


def transformers_side(args, folder):
    import torch
    from transformers import ParakeetForCTC

    torch.set_num_threads(timing.threads())
    model = ParakeetForCTC.from_pretrained(f"{folder}/model.hf")
    inputs = np.load(f"{folder}/inputs.npz")
    mel = torch.tensor(inputs["mel"])
    mask = torch.arange(mel.shape[1]) < torch.tensor(inputs["mel_len"])[:, None]
    if args.part == "encoder":
        model.eval()

        def forward():
            with torch.inference_mode():
                out = model.encoder(mel, attention_mask=mask, output_attention_mask=True)
            return {"encoded": out.last_hidden_state, "encoded_len": out.attention_mask.sum(-1)}

        return forward

    place = np.arange(inputs["tokens"].shape[1]) < inputs["token_len"][:, None]
    labels = torch.tensor(np.where(place, inputs["tokens"], model.config.pad_token_id))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)

    def train():
        optimizer.zero_grad()
        loss = model(mel, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return train


SIDES = {"transformers": transformers_side, "jasr": jasr_side}


def side(name, args, folder):
    """The call of a side, whose first results and, in the end, peak of memory go to the folder."""
    call = SIDES[name](args, folder)
    np.savez(f"{folder}/{name}.npz", **{k: np.asarray(v) for k, v in call().items()})
    timing.trim()
    peak = pathlib.Path(folder, f"{name}.peak")
    atexit.register(lambda: peak.write_text(str(timing.resident("VmHWM"))))
    return call


# ---- the row -------------------------------------------------------------------------------------


def measure(args, folder):
    """Runs, compares and reports."""
    parameters = write(args, folder)
    lines = {name: timing.served(side, name, args, folder) for name in SIDES}
    lines |= timing.nemo(args, args.part, folder)
    print(timing.machine())
    times = timing.in_turns(lines, args.rounds, ready=lambda: compare(folder, lines))
    seconds = float(np.load(f"{folder}/inputs.npz")["mel_len"].sum()) / 100
    extra = [f"{parameters / 1e6:.1f} M parameters, {seconds:.0f} s of audio a call"]
    extra += timing.speeds(times, seconds)
    for name in SIDES:
        peak = int(pathlib.Path(folder, f"{name}.peak").read_text())
        extra.append(f"{name}: peak memory {peak / 2**20:.0f} MiB")
    peer = min(set(times) - {"jasr"}, key=lambda name: np.median(times[name]))
    what = {"encoder": "encoder forward", "step": "CTC training step"}[args.part]
    title = f"{what}, {args.layers} x {args.d_model}, {args.batch} x {args.seconds:g} s"
    timing.report(title, times, ours="jasr", peer=peer, extra=extra)


def compare(folder, names):
    """Prints the largest differences from jasr's results; raises where they are too large."""
    ours = dict(np.load(f"{folder}/jasr.npz"))
    for name in set(names) - {"jasr"}:
        theirs = np.load(f"{folder}/{name}.npz")
        if "loss" in ours:
            loss = float(ours["loss"])
            off = abs(loss / float(theirs["loss"]) - 1)
            line, good = f"loss {loss:.4f}, relative difference {off:.1e}", off < 1e-4
        else:
            valid = np.arange(ours["encoded"].shape[1]) < ours["encoded_len"][:, None]
            worst = np.abs(ours["encoded"] - theirs["encoded"])[valid].max()
            line, good = f"largest difference of the outputs {worst:.1e}", worst < 1e-3
            good = good and (ours["encoded_len"] == theirs["encoded_len"]).all()
        print(f"{name}: {line}")
        if not good:
            raise SystemExit("the two sides do not compute the same; nothing was timed")
