"""How a LaCT model transcribes: greedy CTC of windows."""

from jasr.seam import WindowDecoder


def window_decoder(task):
    """The seam.WindowDecoder of a CtcTask."""

    def decode(variables, batch):
        found = task.predict(variables, batch)
        return {**found, "heard": found["logit_len"]}

    return WindowDecoder(
        sample_rate=task.front_end.sample_rate,
        frame=task.front_end.hop * task.config.subsampling,
        tokenizer=task.tokenizer,
        decode=decode,
        prepare=lambda variables: variables,
        window=lambda meta, trained: min(30.0, max(8.0, trained)) if trained else 20.0,
        text=task.tokenizer.decode,
        totals={"updates": "fast-weight updates an utterance and layer"},
    )
