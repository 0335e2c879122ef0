"""Speech corpora as batches: index (what there is), plan (which batch holds what), batches.

    train = open_train(DataConfig(train=("train.jsonl",)), tokenizer.encode, seed=0)
    for epoch, batch in train.iterate(start=0): ...

A manifest or Shar directory becomes an index of usable utterances; the plan is a pure function of
(settings, seed, epoch); the loader reads each process's rows ahead in threads. The position in the
data is one integer: the number of global batches consumed.
"""

from jasr.data.batches import Eval, Train, open_eval, open_train, texts
from jasr.data.config import DataConfig, DataError

__all__ = ["DataConfig", "DataError", "Eval", "Train", "open_eval", "open_train", "texts"]
