"""NeMo models for tests: the goldens' configs and names with random weights of few numbers."""

import gzip
import json

import numpy as np

from jasr.interop import nemo_archive, plain_yaml, torch_file

KINDS = {"ctc": "ctc", "rnnt": "rnnt", "tdt": "tdt", "hybrid_tdt": "hybrid", "canary": "encoder"}


def folder(goldens):
    return goldens / "nemo" / "archives"


def config_of(goldens, name):
    return plain_yaml.load((folder(goldens) / f"tiny_{name}.yaml").read_bytes())


def state_of(goldens, name, seed=0):
    """Random arrays under the names and of the shapes of a golden's state dict; true buffers."""
    rng = np.random.default_rng(seed)
    keys = json.loads((folder(goldens) / f"tiny_{name}.keys.json").read_text())
    state = {}
    for key, (shape, dtype) in keys.items():
        array = rng.standard_normal(shape) if dtype == "torch.float32" else np.array(7)
        state[key] = np.asarray(array, dtype.removeprefix("torch."))
    with np.load(folder(goldens) / "featurizer_80.npz") as z:
        return state | {f"preprocessor.featurizer.{key}": z[key] for key in z}


def tokenizer_of(goldens, tmp_path):
    """The bytes of the goldens' SentencePiece model, of 64 pieces."""
    with nemo_archive.opened(plain(goldens, tmp_path)) as archive:
        return next(archive.read(n) for n in archive.members if n.endswith("tokenizer.model"))


def plain(goldens, tmp_path):
    """Path of the golden archive as a plain tar."""
    path = tmp_path / "tiny_ctc.nemo"
    if not path.exists():
        packed = (folder(goldens) / "tiny_ctc_gzip.nemo").read_bytes()
        path.write_bytes(gzip.decompress(packed))
    return path


def build(path, config, state, tokenizer=None):
    """A .nemo of a config, a state dict (or the bytes of the weights) and a tokenizer."""
    weights = state
    if not isinstance(state, bytes):
        torch_file.write(path.with_suffix(".pt"), state)
        weights = path.with_suffix(".pt").read_bytes()
    members = {nemo_archive.CONFIG: config, nemo_archive.WEIGHTS: weights}
    if not isinstance(config, bytes):
        config = dict(config)
        if tokenizer is not None:
            config["tokenizer"] = {"type": "bpe", "model_path": "nemo:0a_tokenizer.model"}
            members["0a_tokenizer.model"] = tokenizer
        members[nemo_archive.CONFIG] = plain_yaml.dump(config)
    nemo_archive.write(path, members)
    return path
