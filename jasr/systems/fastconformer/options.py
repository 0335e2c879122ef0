"""How a model decodes, as changes of its config: what --beam, --branch, --attention and
--att_context mean."""

LOCAL_CONTEXT = (128, 128)  # encoder frames left and right, as NeMo suggests for long recordings
MOST_CONTEXT = 100_000  # frames to either side: hours, more than any piece has


def beam(text):
    """The hypotheses that --beam asks for; ValueError unless they are a number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--beam={text}: a number of hypotheses, at least 1")
    return int(text)


def context(text):
    """(left, right) frames of "left,right"; ValueError for anything else."""
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(parts) != 2 or len(numbers) != 2 or max(numbers) > MOST_CONTEXT:
        raise ValueError(
            f"--att_context={text}: give two numbers of frames up to {MOST_CONTEXT}, e.g. 128,128"
        )
    return tuple(numbers)


def changes(config, given):
    """{dotted key of the config: value} of the options that are given.

    Args:
      config: the run's. given: some of {"beam": hypotheses of a beam search, 1 = greedy; "branch":
        "transducer" or "ctc" of a hybrid; "attention": "local" lets every frame read "att_context"
        (left, right) frames, LOCAL_CONTEXT if there is none, with the weights of attention over all
        (NeMo's change_attention_model), "full" asserts that attention is not local}.

    Raises:
      ValueError: the model has no such branch or attention, or CTC is given a beam.
    """
    from jasr import settings
    from jasr.systems.fastconformer.model import ParakeetConfig
    from jasr.systems.fastconformer.settings import DecodingConfig

    model = settings.build(ParakeetConfig, config["model"], "config.model")
    how = settings.build(DecodingConfig, config.get("decoding", {}), "config.decoding")
    found, branch, beams = {}, given.get("branch", ""), given.get("beam", 0)
    if branch:
        if branch != ("transducer" if model.is_transducer else "ctc") and model.kind != "hybrid":
            raise ValueError(f"branch {branch!r}: a model of kind {model.kind!r} is no hybrid")
        found["decoding.branch"] = branch
        beams = beams or (1 if branch == "ctc" else 0)
    if beams > 1 and (not model.is_transducer or (branch or how.branch) == "ctc"):
        raise ValueError(f"beam {beams}: a beam search is a transducer's; CTC is greedy")
    if beams:
        greedy = how.strategy if how.strategy != "beam" else "greedy_batch"
        found["decoding.strategy"] = "beam" if beams > 1 else greedy
        found["decoding.beam"] = beams
    return found | _attention(model.encoder, given.get("attention", ""), given.get("att_context"))


def _attention(encoder, kind, context):
    if context and kind != "local":
        raise ValueError("att_context is of attention 'local'")
    if kind == "full" and encoder.is_local:
        raise ValueError("attention 'full': this encoder was trained with local attention")
    if kind not in ("", "full", "local"):
        raise ValueError(f"attention {kind!r}: choose full or local")
    if kind != "local":
        return {}
    if encoder.self_attention_model == "abs_pos":
        raise ValueError("attention 'local': this encoder has absolute positions ('abs_pos')")
    if encoder.att_context_style != "regular":
        raise ValueError(
            f"attention 'local': this encoder reads in chunks ({encoder.att_context_style!r}), "
            "which bounds its memory already"
        )
    values = {
        "self_attention_model": "rel_pos_local_attn",
        "att_context_size": tuple(context or LOCAL_CONTEXT),
        "att_context_probs": (),
        "tied_local_biases": encoder.tied_biases,
    }
    return {f"model.encoder.{name}": value for name, value in values.items()}
