"""NeMo beside jasr in a benchmark: one computation, again and again, run by NeMo's own Python.

    PYTHON third_party/nemo/rival.py COMMAND --model=x.nemo [--input=in.npz] [--output=out.npz]
        [--threads=N] [--max_symbols=10] [--strategy=greedy_batch]

The model is restored, the computation runs once, its results are written to --output, and "done" is
printed; then it runs once more for every line of standard input, with a "done" after each: the
protocol of `experiments.bench.timing.serve`, so that `timing.in_turns` of {"jasr": a command line,
"NeMo": this one} times it in turns with others. All else that NeMo prints goes to standard error.

    COMMAND    --input holds                                --output gets
    features   audio f32[B,S], audio_len [B]                mel f32[B,T,F], mel_len [B]
    encoder    mel f32[B,T,F], mel_len [B]                  encoded f32[B,T',D], encoded_len [B]
    greedy     encoded f32[B,T',D], encoded_len [B]         tokens i32[B,L], token_len, start_frame
               (a transducer; with word and segment times)  i32[B,L], durations i32[B,L], text [B]
    step       mel, mel_len, tokens i32[B,U], token_len     loss f32[] of the first step (CTC only)
    restore    nothing                                      {key: sum of the weight, f64[]}

Padding of integer outputs is -1. `step` is forward, loss, backward and AdamW (lr 1e-3, without
weight decay) in training mode with every dropout at 0; SpecAugment and dither do not run, and the
weights change from call to call. TDT's loss needs a GPU in NeMo, so there is no step for it.
Every `restore` is EncDec...restore_from, whose seconds include no import.
"""

import argparse
import os
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.bench.timing import serve  # needs the standard library alone


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--model", required=True, help="a .nemo")
    parser.add_argument("--input", default="", help=".npz with the command's inputs")
    parser.add_argument("--output", default="", help=".npz for the first call's results")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 = its default")
    parser.add_argument("--max_symbols", type=int, default=10)
    parser.add_argument("--strategy", default="greedy_batch", choices=("greedy", "greedy_batch"))
    args = parser.parse_args()
    ours = os.dup(1)
    os.dup2(2, 1)  # what NeMo's loggers write to standard output
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    given = dict(np.load(args.input)) if args.input else {}
    call = COMMANDS[args.command](args, given)
    written = False

    def timed():
        nonlocal written
        result = call()
        if not written and args.output:
            np.savez(args.output, **result())
        written = True

    sys.stdout = os.fdopen(ours, "w")
    serve(timed)


def restore(path):
    """The model of a .nemo on the CPU, for inference."""
    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)
    return ASRModel.restore_from(path, map_location=torch.device("cpu"), strict=True).eval()


def tensors(given, *names):
    import torch

    return [torch.from_numpy(np.ascontiguousarray(given[name])) for name in names]


def features(args, given):
    import torch

    model, (audio, length) = restore(args.model), tensors(given, "audio", "audio_len")

    def call():
        with torch.inference_mode():
            mel, mel_len = model.preprocessor(input_signal=audio, length=length)
        return lambda: {"mel": mel.transpose(1, 2).numpy(), "mel_len": mel_len.numpy()}

    return call


def encoder(args, given):
    import torch

    model, (mel, length) = restore(args.model), tensors(given, "mel", "mel_len")
    mel = mel.transpose(1, 2).contiguous()

    def call():
        with torch.inference_mode():
            out, out_len = model.encoder(audio_signal=mel, length=length)
        return lambda: {"encoded": out.transpose(1, 2).numpy(), "encoded_len": out_len.numpy()}

    return call


def decode_greedily(model, strategy, max_symbols, ctc=False):
    """Sets greedy decoding with timestamps of all kinds; `max_symbols` None is the file's."""
    from omegaconf import open_dict

    cfg = model.cfg.aux_ctc.decoding if ctc and "aux_ctc" in model.cfg else model.cfg.decoding
    with open_dict(cfg):
        cfg.strategy = strategy
        cfg.compute_timestamps = True
        if "greedy" not in cfg or cfg.greedy is None:
            cfg.greedy = {}
        if max_symbols and not ctc:
            cfg.greedy.max_symbols = max_symbols
    if "aux_ctc" in model.cfg:
        model.change_decoding_strategy(cfg, decoder_type="ctc" if ctc else "rnnt", verbose=False)
    else:
        model.change_decoding_strategy(cfg, verbose=False)


def padded(rows):
    """i32[B,L] of integer sequences, padded with -1."""
    table = np.full((len(rows), max([len(r) for r in rows] + [1])), -1, np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = np.asarray(values, np.int32)
    return table


def frames(hypothesis):
    """The frames of a hypothesis's tokens: a list, or with timestamps under "timestep"."""
    found = hypothesis.timestamp
    return list(found["timestep"] if isinstance(found, dict) else found)


def greedy(args, given):
    import torch

    model, (encoded, length) = restore(args.model), tensors(given, "encoded", "encoded_len")
    decode_greedily(model, args.strategy, args.max_symbols)
    encoded = encoded.transpose(1, 2).contiguous()

    def call():
        with torch.inference_mode():
            found = model.decoding.rnnt_decoder_predictions_tensor(
                encoder_output=encoded, encoded_lengths=length, return_hypotheses=True
            )
        return lambda: {
            "tokens": padded([h.y_sequence for h in found]),
            "token_len": np.array([len(h.y_sequence) for h in found]),
            "start_frame": padded([frames(h) for h in found]),
            "durations": padded(
                [[] if h.token_duration is None else h.token_duration for h in found]
            ),
            "text": np.array([h.text for h in found]),
        }

    return call


def step(args, given):
    import torch

    model = restore(args.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    mel, mel_len, tokens, token_len = tensors(given, "mel", "mel_len", "tokens", "token_len")
    mel = mel.transpose(1, 2).contiguous()

    def call():
        optimizer.zero_grad()
        out, out_len = model.encoder(audio_signal=mel, length=mel_len)
        log_probs = model.decoder(encoder_output=out)
        loss = model.loss(
            log_probs=log_probs, targets=tokens, input_lengths=out_len, target_lengths=token_len
        )
        loss.backward()
        optimizer.step()
        return lambda: {"loss": loss.detach().numpy()}

    return call


def restored(args, given):
    def call():
        model = restore(args.model)
        return lambda: {k: v.double().sum().numpy() for k, v in model.state_dict().items()}

    restore(args.model)  # lazy imports
    return call


COMMANDS = {
    "features": features,
    "encoder": encoder,
    "greedy": greedy,
    "step": step,
    "restore": restored,
}

if __name__ == "__main__":
    main()
