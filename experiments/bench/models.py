"""NeMo's recognisers with random weights, in files that jasr and its peers load."""

import numpy as np


def build(model, pieces, **sections):
    """(seam.Task, meta as a checkpoint has it) of a FastConformer recogniser.

    Args:
      model: config.model; its encoder gets Parakeet's subsampling.
      pieces: size of its vocabulary, without the blank. sections: others of its config.
    """
    from jasr import text
    from jasr.systems import loading
    from jasr.text import sentencepiece_model as spm

    listed = [spm.Piece.of("<unk>", type=spm.UNKNOWN)]
    listed += [spm.Piece.of(f"\u2581{n}", -float(n)) for n in range(1, pieces)]
    tokenizer = spm.Model(tuple(listed), ()).with_settings(model_type=1)
    encoder = {"subsampling": "dw_striding", "subsampling_factor": 8, "conv_kernel_size": 9}
    encoder |= {"xscaling": False, **model["encoder"]}
    config = {"task": "fastconformer", "model": {**model, "encoder": encoder}, **sections}
    task = loading.build(config, text.SentencePieceTokenizer(tokenizer.to_bytes()))
    return task, {"config": config, "tokenizer": task.tokenizer.to_dict()}


def sample(task):
    """What `task.model.init` needs besides a key."""
    mel = np.zeros((1, 16, task.front_end.n_mels), np.float32)
    return mel, np.array([16], np.int32)


def random_leaves(task, weight):
    """{path: weight(path, shape)} of a task's variables, which are not computed."""
    import jax

    from jasr import tree

    shapes = jax.eval_shape(task.model.init, jax.random.key(0), *sample(task))
    return {path: weight(path, leaf.shape) for path, leaf in tree.flatten(dict(shapes)).items()}


def write(folder, meta, leaves, formats):
    """Writes folder/model.nemo, folder/model.hf: those of the formats."""
    from jasr.systems import source

    for name in formats:
        source.export(name, f"{folder}/model.{name}", meta, leaves, {})
