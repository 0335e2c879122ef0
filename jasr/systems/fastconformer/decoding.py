"""How NeMo's recognisers transcribe: greedily or by a beam, with NeMo's timestamps on request."""

import jax
import jax.numpy as jnp

from jasr.seam import WindowDecoder
from jasr.systems.fastconformer import times

LOCAL_SECONDS = 600.0  # the window of local attention


def window_decoder(task):
    """The seam.WindowDecoder of a ParakeetTask."""
    timed = task.decodes != "ctc"
    front, encoder = task.front_end, task.config.encoder

    def decode(variables, batch):
        found = task.predict(variables, batch)
        return {**found, "heard": heard(found) if timed else found["logit_len"]}

    def prepare(variables):
        return {**variables, "tables": jax.jit(task.tables)(variables)}

    def window(meta, trained):
        if encoder.is_local:
            return LOCAL_SECONDS
        nemo = nemo_section(meta, "train_ds").get("max_duration")
        if trained or not isinstance(nemo, (int, float)):
            return min(30.0, max(8.0, trained)) if trained else 20.0
        return min(60.0, max(8.0, nemo))

    def nemo_times(tokens, start_frame, end_frame, durations=None, *, meta):
        return times.timestamps(
            task.decodes,
            tokens,
            start_frame,
            end_frame,
            task.tokenizer,
            durations=durations if task.decodes == "tdt" else None,
            window_stride=front.hop / front.sample_rate,
            subsampling=task.config.frame_rate_divisor,
            **times_options(meta),
        )

    return WindowDecoder(
        sample_rate=front.sample_rate,
        frame=front.hop * task.config.frame_rate_divisor,
        tokenizer=task.tokenizer,
        decode=decode,
        prepare=prepare,
        window=window,
        text=task.text,
        marks=times.punctuation(task.tokenizer),
        columns=("durations",) if timed else (),
        extras={"nemo": nemo_times},
    )


def heard(found):
    """i32[B] frames that a transducer has decoded: a row that is full stopped at its last token."""
    last = jnp.maximum(found["token_len"] - 1, 0)[:, None]
    end = jnp.take_along_axis(found["end_frame"], last, axis=1)[:, 0]
    return jnp.where(found["full"] & (found["token_len"] > 0), end, found["logit_len"])


def nemo_section(meta, name):
    """A section of the NeMo config that a model came with; {} without one."""
    config = meta.get("nemo", {}).get("config", {})
    found = config.get(name) or (config.get("model") or {}).get(name)
    return found if isinstance(found, dict) else {}


def times_options(meta):
    """What the NeMo config of a model says of its timestamps, for `times.timestamps`."""
    given = nemo_section(meta, "decoding")
    separators = given.get("segment_seperators")  # NeMo's spelling
    options = {"separators": tuple(separators)} if isinstance(separators, list) else {}
    return options | {"segment_gap": given.get("segment_gap_threshold")}
