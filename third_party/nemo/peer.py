"""NeMo's side of check.py, run by NeMo's own Python: models are restored and run, results written.

    PYTHON third_party/nemo/peer.py jobs.json

A job is {"model": a .nemo, "input": .npz of audio f32[B,S], audio_len [B] and tokens i32[B,U],
"output": .npz to be written, "texts": .json to be written, "saved": .nemo to be written, "hybrid":
whether there are two heads}. Arrays written: mel f32[B,T,F], mel_len, encoded f32[B,T',D],
encoded_len, and by head ctc f32[B,T',V+1] and joint f32[B,T',U+1,V+1+E], log-probabilities; and
batch_tokens/<head>, batch_frames/<head> i32[B,L] of one batched greedy decoding. The JSON has by
head what `transcribe(timestamps=True)` gives for every recording by itself. A job that raises has
the error in its JSON, and the next one follows.
"""

import json
import pathlib
import sys
import traceback

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import rival


def main():
    for job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        try:
            found = run(job)
        except Exception as e:  # reported as a difference by check.py
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}"}
        pathlib.Path(job["texts"]).write_text(json.dumps(found))


def run(job):
    """Writes a job's arrays and archive; returns what its JSON holds."""
    import torch

    model = rival.restore(job["model"])
    given = dict(np.load(job["input"]))
    audio, length, tokens = rival.tensors(given, "audio", "audio_len", "tokens")
    heads = ["ctc"] if not hasattr(model, "joint") else ["transducer", "ctc"][: 1 + job["hybrid"]]
    with torch.inference_mode():
        mel, mel_len = model.preprocessor(input_signal=audio, length=length)
        encoded, encoded_len = model.encoder(audio_signal=mel, length=mel_len)
    arrays = {"mel": mel.transpose(1, 2), "encoded": encoded.transpose(1, 2)}
    arrays |= {"mel_len": mel_len, "encoded_len": encoded_len}
    texts = {}
    for head in heads:
        rival.decode_greedily(model, "greedy_batch", None, ctc=head == "ctc")
        with torch.inference_mode():
            if head == "ctc":
                decoder = model.ctc_decoder if hasattr(model, "joint") else model.decoder
                arrays["ctc"] = decoder(encoder_output=encoded)
                decoding = getattr(model, "ctc_decoding", None) or model.decoding
                found = decoding.ctc_decoder_predictions_tensor(
                    arrays["ctc"], decoder_lengths=encoded_len, return_hypotheses=True
                )
            else:
                pred, *_ = model.decoder(targets=tokens, target_length=given_length(tokens))
                joint = model.joint.joint(encoded.transpose(1, 2), pred.transpose(1, 2))
                arrays["joint"] = joint.log_softmax(-1)
                found = model.decoding.rnnt_decoder_predictions_tensor(
                    encoder_output=encoded, encoded_lengths=encoded_len, return_hypotheses=True
                )
                arrays["batch_tokens/transducer"] = rival.padded([h.y_sequence for h in found])
                arrays["batch_frames/transducer"] = rival.padded([rival.frames(h) for h in found])
        texts[head] = {
            "batch": [h.text for h in found],
            "single": [single(model, x[:n]) for x, n in zip(given["audio"], given["audio_len"])],
        }
    arrays = {k: v.numpy() if hasattr(v, "numpy") else v for k, v in arrays.items()}
    np.savez(job["output"], **arrays)
    model.save_to(job["saved"])
    return texts


def given_length(tokens):
    import torch

    return torch.full((tokens.shape[0],), tokens.shape[1])


def single(model, audio):
    """A recording's text, token ids and timestamps from `transcribe`."""
    found = model.transcribe(audio, batch_size=1, timestamps=True, verbose=False)
    hypothesis = found[0]
    tokens = hypothesis.y_sequence  # of CTC: log-probabilities
    return {
        "text": hypothesis.text,
        "tokens": plain(tokens) if getattr(tokens, "ndim", 1) == 1 else None,
        "timestamp": {k: plain(v) for k, v in hypothesis.timestamp.items()},
    }


def plain(value):
    """Tensors and numpy numbers as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
