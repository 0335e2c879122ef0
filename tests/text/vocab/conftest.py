"""NeMo's goldens of vocabulary expansion.

goldens/nemo/vocab: NeMo 3.0.0's tiny hybrid TDT model before ("old/*", where it differs) and after
("new/*") change_vocabulary and the transfer of the old rows; its encoder's output;
the base tokenizer; pieces, scores and encodings of three ways to merge. The new tokenizer is
trained here on corpus_new.txt.
"""

import json
import lzma

import pytest

from jasr.text.sentencepiece_model import Model


@pytest.fixture(scope="session")
def folder(goldens):
    return goldens / "nemo" / "vocab"


@pytest.fixture(scope="session")
def base(folder):
    """The tokenizer that NeMo trained for its tiny models: BPE, 64 pieces."""
    return Model.from_bytes(lzma.decompress((folder / "base.model.xz").read_bytes()))


@pytest.fixture(scope="session")
def golden(folder):
    """Texts, their ids under every tokenizer, transcripts after the transfer."""
    return json.loads((folder / "expansion.json").read_text(encoding="utf-8"))
