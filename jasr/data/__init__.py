"""Speech corpora as batches: index (what there is), plan (which batch holds what), batches.

    cfg = DataConfig(train=("train.jsonl",))
    train = open_train(cfg, AudioText(cfg, 16000, tokenizer.encode), seed=0)
    for epoch, bucket, batch in train.iterate(start=0): ...

A manifest or Shar directory becomes an index of usable items; the plan is a pure function of
(settings, seed, epoch); what an item measures and how it fills a row is the layout's matter; the
loader reads each process's rows ahead in threads. The position in the data is one integer: the
number of global batches consumed.
"""

_HOMES = {
    "AudioText": "audio_text",
    "DataConfig": "config",
    "DataError": "config",
    "Eval": "batches",
    "Train": "batches",
    "open_eval": "batches",
    "open_evals": "batches",
    "open_train": "batches",
    "texts": "entries",
}
__all__ = list(_HOMES)


def __getattr__(name):  # settings and preparation do without the loader's imports
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
