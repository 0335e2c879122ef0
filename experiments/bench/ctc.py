"""CTC loss, forward and backward from logits, beside torch.nn.functional.ctc_loss and optax.

    python -m experiments.benchmark ctc [--B=8 --T=500 --U=100 --V=1025 --rounds=21]

Each side takes float32 logits to the summed loss and its gradient with respect to the logits,
log-softmax included. PyTorch gets the faster of its two usual layouts. Losses and gradients are
compared first, with PyTorch in float64.
"""

import numpy as np

from experiments.bench import timing


def problem(B, T, U, V):
    """Random logits and ragged, feasible lengths; blank 0."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((B, T, V), dtype=np.float32)
    logit_len = rng.integers(3 * T // 4, T + 1, B).astype(np.int32)
    token_len = rng.integers(3 * U // 4, U + 1, B).astype(np.int32)
    logit_len[0], token_len[0] = T, U
    tokens = rng.integers(1, V, (B, U)).astype(np.int32)
    return logits, logit_len, tokens, token_len


def jasr_side(logits, logit_len, tokens, token_len):
    from jasr.losses.ctc import ctc_loss

    return in_jax(lambda x: ctc_loss(x, logit_len, tokens, token_len)[0].sum(), logits)


def optax_side(logits, logit_len, tokens, token_len):
    import optax

    frame_pad = (np.arange(logits.shape[1]) >= logit_len[:, None]).astype(np.float32)
    token_pad = (np.arange(tokens.shape[1]) >= token_len[:, None]).astype(np.float32)
    return in_jax(lambda x: optax.ctc_loss(x, frame_pad, tokens, token_pad).sum(), logits)


def in_jax(loss, logits):
    """Thunk -> loss and its gradient."""
    import jax

    step, logits = jax.jit(jax.value_and_grad(loss)), jax.numpy.asarray(logits)
    return lambda: jax.block_until_ready(step(logits))


def torch_side(logits, logit_len, tokens, token_len, time_major, double=False):
    import torch

    torch.set_num_threads(timing.threads())
    x = torch.tensor(logits.transpose(1, 0, 2).copy() if time_major else logits)
    x = (x.double() if double else x).requires_grad_(True)
    lens = torch.tensor(logit_len, dtype=torch.long), torch.tensor(token_len, dtype=torch.long)
    targets = torch.tensor(tokens, dtype=torch.long)

    def call():
        x.grad = None
        log_probs = x.log_softmax(-1)
        log_probs = log_probs if time_major else log_probs.transpose(0, 1)
        loss = torch.nn.functional.ctc_loss(log_probs, targets, *lens, reduction="sum")
        loss.backward()
        grad = x.grad.transpose(0, 1) if time_major else x.grad
        return loss.detach().numpy(), grad.numpy()

    return call


def main(argv=None):
    args = timing.parser("ctc", __doc__, B=8, T=500, U=100, V=1025, rounds=21).parse_args(argv)
    inputs = problem(args.B, args.T, args.U, args.V)
    sides = {
        "jasr": jasr_side(*inputs),
        "optax": optax_side(*inputs),
        "torch [B,T,V]": torch_side(*inputs, time_major=False),
        "torch [T,B,V]": torch_side(*inputs, time_major=True),
    }
    exact, exact_grad = torch_side(*inputs, time_major=False, double=True)()
    lines = [timing.machine(), f"errors against PyTorch in float64, loss {float(exact):.4f}:"]
    for name, side in sides.items():
        loss, grad = side()
        off = abs(float(loss) - float(exact))
        grad_off = float(np.max(np.abs(np.asarray(grad) - exact_grad)))
        lines.append(f"  {name:<14} loss {off:.1e}, gradient {grad_off:.1e}")
        if off > 1e-5 * abs(float(exact)) or grad_off > 5e-3:
            raise SystemExit(f"outputs differ, nothing was timed: {lines[-1].strip()}")
    times = timing.interleave(sides, rounds=args.rounds, warmup=2)
    peer = min(("torch [B,T,V]", "torch [T,B,V]"), key=lambda n: np.median(times[n]))
    title = f"CTC loss + gradient, B{args.B} T{args.T} U{args.U} V{args.V} float32"
    timing.report(title, times, peer=peer, ours="jasr", extra=lines)
