"""Whether NeMo loads what jasr writes, and computes the same with it.

    python third_party/nemo/check.py [--venv=.nemo-venv] [--models=DIR] [--torch_index=URL]

NeMo 3.0.0 gets an environment of its own, once (some 2 GB with PyTorch for the CPU). Then jasr
makes small models with its own commands (trained, fine-tuned, with a larger vocabulary, averaged,
of many settings: models.py), exports each as .nemo, and NeMo restores each of them strictly, runs
it on recordings of tests/data and saves it again. Compared are log-mel frames (1e-3), encoder
frames and log-probabilities (1e-5, as shares of the largest value above 1), greedy token ids,
frames, texts (but for runs of spaces, which jasr writes as one) and times of tokens, words and
segments (equal), and after NeMo's save_to weights (bit for bit) and settings. --models adds
every .nemo of a directory. Prints a table; the exit status is 1 if anything differs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

NEMO = "nemo_toolkit[asr]==3.0.0"
COLUMNS = ("mel", "encoder", "log-probs", "ids", "texts", "times", "weights")
LIMITS = {"mel": 1e-3, "encoder": 1e-5, "log-probs": 1e-5}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".nemo-venv", help="NeMo's environment; made if missing")
    parser.add_argument("--torch", default="torch==2.13.0", help="installed before NeMo")
    parser.add_argument("--torch_index", default="", help="pip's --index-url for PyTorch")
    parser.add_argument("--pip_flags", default="", help="for every pip call, in one argument")
    parser.add_argument("--models", default="", help="a directory with more .nemo files")
    parser.add_argument("--only", nargs="+", default=(), help="names in the table's first column")
    parser.add_argument("--steps", type=int, default=200, help="of training the small models")
    parser.add_argument("--workdir", default="", help="keep the models there (a temporary one)")
    args = parser.parse_args(argv)
    python = install(args)
    import models

    from jasr import compilation_cache

    compilation_cache.enable()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.workdir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        given = sorted(pathlib.Path(args.models).glob("*.nemo")) if args.models else ()
        entries = list(models.make(folder, args.steps, given, args.only))
        if not entries:
            parser.error(f"no model is called {' or '.join(args.only)}")
        jobs = [job(folder, n, entry) for n, entry in enumerate(entries)]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        with open(folder / "nemo.log", "w") as log:
            line = [python, str(HERE / "peer.py"), str(folder / "jobs.json")]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}  # the models are small
            if subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=env).returncode:
                tail = (folder / "nemo.log").read_text().splitlines()[-20:]
                raise SystemExit("NeMo's side failed:\n" + "\n".join(tail))
        print(f"\n{'':<24}" + "".join(f"{name:>12}" for name in COLUMNS))
        good = [compared(entry, job) for entry, job in zip(entries, jobs, strict=True)]
    print(f"{sum(good)} of {len(good)} models are the same in NeMo 3.0.0 and jasr")
    return 0 if all(good) else 1


def install(args):
    """The path of a Python that has NeMo; makes its environment where there is none."""
    folder = pathlib.Path(args.venv).absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    found = python.exists() and subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('nemo_toolkit'))"],
        capture_output=True,
    )
    if found and found.returncode == 0:
        return str(python)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", *args.pip_flags.split()]
    index = ["--index-url", args.torch_index] if args.torch_index else []
    for what in ([*index, args.torch], [NEMO]):
        if what[-1] and subprocess.run([*pip, *what]).returncode:
            raise SystemExit(f"pip could not install {what[-1]}; see above")
    return str(python)


def job(folder, number, entry):
    """What peer.py is told of a model; its input is written."""
    import numpy as np

    from jasr.systems import loading

    task, _, _ = loading.load(entry["source"])
    recordings = audio(task.front_end.sample_rate)
    length = np.array([len(x) for x in recordings], np.int32)
    batch = np.zeros((len(recordings), length.max()), np.float32)
    for row, samples in zip(batch, recordings, strict=True):
        row[: len(samples)] = samples
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, task.tokenizer.vocab_size - 1, (len(batch), 4), np.int32)
    base = folder / f"job{number}"
    np.savez(f"{base}.in.npz", audio=batch, audio_len=length, tokens=tokens)
    return {
        "model": entry["nemo"],
        "input": f"{base}.in.npz",
        "output": f"{base}.npz",
        "texts": f"{base}.json",
        "saved": f"{base}.nemo",
        "hybrid": getattr(task.config, "kind", "") == "hybrid",
    }


def audio(sample_rate):
    """Recordings of tests/data: four that the small models are trained on, two that are new."""
    import models

    from jasr import audio

    paths = [
        *sorted(models.DATA.glob("train/*.flac"))[:4],
        *sorted(models.DATA.glob("valid/*"))[:2],
    ]
    return [audio.read(path, sample_rate) for path in paths]


# ---- comparing -----------------------------------------------------------------------------------


def compared(entry, job):
    """Prints a model's row; whether all of it is the same."""
    import numpy as np

    name = entry["name"]
    theirs = json.loads(pathlib.Path(job["texts"]).read_text())
    if "error" in theirs:
        print(f"{name:<24}  NeMo: {theirs['error']}")
        return False
    given, arrays = (dict(np.load(job[key])) for key in ("input", "output"))
    task, variables = loaded(entry)
    row, notes = numbers(task, variables, given, arrays)
    texts, more = decoded(entry["source"], task, variables, given, arrays, theirs)
    row |= texts
    row["weights"], last = saved_again(job)
    cells = "".join(f"{cell(row[column]):>12}" for column in COLUMNS)
    print(f"{name:<24}{cells}   {example(theirs)}")
    for note in (*notes, *more, *last):
        print(f"    {note}")
    return all(row[c] <= LIMITS[c] if c in LIMITS else row[c] is True for c in COLUMNS)


def loaded(entry):
    """The task and variables of a model's source.

    NeMo 3.0.0 runs files of versions before 2.5 as newer ones, though it keeps the version in them;
    jasr runs them as their own version did unless it is told otherwise, as here.
    """
    from jasr.systems import loading

    task, variables, meta = loading.load(entry["source"])
    if entry["old"]:
        config = meta["config"]
        encoder = {**config["model"]["encoder"], "masked_subsampling": True}
        config = {**config, "model": {**config["model"], "encoder": encoder}}
        config["front_end"] = {**config["front_end"], "kind": "nemo"}
        task = loading.build(config, task.tokenizer)
    return task, variables


def cell(value):
    return ("same" if value else "DIFFERS") if isinstance(value, bool) else f"{value:.1e}"


def example(theirs):
    """The longest text, cut."""
    found = max((single["text"] for single in next(iter(theirs.values()))["single"]), key=len)
    return found if len(found) < 40 else f"{found[:37]}..."


def numbers(task, variables, given, arrays):
    """Largest differences of the stages, each from NeMo's output of the one before; and notes."""
    import jax
    import numpy as np

    mel, mel_len = jax.device_get(jax.jit(task.features)(given))
    encode = jax.jit(lambda v, x, n: task.model.apply(v, x, n, method="encode"))
    enc, enc_len = jax.device_get(encode(variables, arrays["mel"], arrays["mel_len"]))
    notes = [
        f"lengths of {what}: jasr {list(map(int, a))}, NeMo {list(map(int, b))}"
        for what, a, b in (
            ("mel", mel_len, arrays["mel_len"]), ("encoder", enc_len, arrays["encoded_len"])
        )
        if list(a) != list(b)
    ]  # fmt: skip
    if notes:
        return dict.fromkeys(LIMITS, float("inf")), notes
    encoded = arrays["encoded"]
    row = {"mel": apart(mel, arrays["mel"], mel_len), "encoder": apart(enc, encoded, enc_len)}
    probs = []
    run = jax.jit(lambda v, f, *x: task.model.apply(v, *x, method=f), static_argnums=1)
    if task.config.has_ctc:
        logits = run(variables, "ctc_logits", encoded)
        probs.append(apart(jax.nn.log_softmax(logits), arrays["ctc"], enc_len))
    if task.config.is_transducer:
        one, two, kernel, bias = run(variables, "joint_parts", encoded, given["tokens"])
        activation = getattr(jax.nn, task.config.joint.activation)
        logits = activation(one[:, :, None] + two[:, None]) @ kernel + bias
        probs.append(apart(jax.nn.log_softmax(logits), arrays["joint"], enc_len))
    return row | {"log-probs": float(np.max(probs))}, notes


def apart(ours, theirs, length):
    """The largest difference within the lengths, in units of the largest value above 1.

    Infinity where the shapes differ or a value within the lengths is not finite.
    """
    import numpy as np

    if ours.shape[2:] != theirs.shape[2:]:
        return float("inf")
    most = 0.0
    for a, b, n in zip(np.asarray(ours), theirs, length, strict=True):
        if not (np.isfinite(a[:n]).all() and np.isfinite(b[:n]).all()):
            return float("inf")  # max(0.0, nan) would be 0.0
        most = max(most, np.abs(a[:n] - b[:n]).max(initial=0.0) / max(1.0, np.abs(b[:n]).max()))
    return float(most)


def decoded(source, task, variables, given, arrays, theirs):
    """Whether ids with frames, texts and times are the same from the audio on; and notes.

    A recording by itself and in the batch give the same, except where the norm of the convolutions
    sees the padding: there jasr decodes it by itself, too. NeMo gives no ids of CTC.
    """
    import jax
    import numpy as np

    from jasr.systems import loading

    row, notes = dict.fromkeys(("ids", "texts", "times"), True), []
    sees_padding = task.config.encoder.conv_norm_type.startswith(("group", "instance"))
    for head, found in theirs.items():
        if task.config.kind == "hybrid":
            task, variables, _ = loading.load(source, options={"branch": head})
        predict = jax.jit(task.predict)
        together = predict(variables, given)
        for n, single in enumerate(found["single"]):
            batch = alone = trimmed(together, n)
            if sees_padding:
                samples = given["audio"][n : n + 1, : given["audio_len"][n]]
                one = {"audio": samples, "audio_len": np.array([samples.shape[1]], np.int32)}
                alone = trimmed(predict(variables, one), 0)
            times = task.verbs["transcribe"].extras["nemo"](*alone, meta={})
            if task.config.encoder.has_reduction:
                times, single = in_frames(times), in_frames(single)
            pairs = {
                "texts": [
                    (task.text(alone[0]), " ".join(single["text"].split())),
                    (task.text(batch[0]), " ".join(found["batch"][n].split())),
                ],
                "times": [(times[k], single["timestamp"].get(k)) for k in times],
            }
            if head != "ctc":
                names = ("tokens", "frames")
                other = [[int(x) for x in arrays[f"batch_{k}/{head}"][n] if x >= 0] for k in names]
                pairs["ids"] = [(alone[0], single["tokens"]), (list(batch[:2]), other)]
            for column, both in pairs.items():
                for ours, other in both:
                    if ours != other:
                        row[column] = False
                        notes.append(f"{head}, recording {n}: jasr {ours!r:.200}")
                        notes.append(f"{' ' * len(head)}               NeMo {other!r:.200}")
    return row, notes[:6]


def trimmed(out, row):
    """(tokens, first frames, last frames, durations or None) of a row of `predict`, as lists."""
    size = int(out["token_len"][row])
    names = ("tokens", "start_frame", "end_frame", "durations")
    return tuple(out[k][row, :size].tolist() if k in out else None for k in names)


def in_frames(times):
    """Timestamps without seconds: NeMo's forget that a reduction makes frames longer."""
    if isinstance(times, dict):
        return {k: in_frames(v) for k, v in times.items() if k not in ("start", "end")}
    return [in_frames(x) for x in times] if isinstance(times, list) else times


def saved_again(job):
    """Whether what NeMo saved is bit for bit what it was given; and notes."""
    from jasr.systems.fastconformer import nemo

    first, again = nemo.read(job["model"]), nemo.read(job["saved"])
    want, got = nemo.state_dict(first), nemo.state_dict(again)
    notes = [
        f"{key} is not what it was"
        for key in sorted(want.keys() | got.keys())
        if key not in want or key not in got or want[key].tobytes() != got[key].tobytes()
    ]
    if first.config != again.config:
        notes.append(f"settings: {first.config} became {again.config}")
    if first.tokenizer != again.tokenizer:
        notes.append("the tokenizer is not what it was")
    return not notes, notes[:6]


if __name__ == "__main__":
    sys.exit(main())
