"""Error rates of texts, each side normalised in the same way."""

from jasr import metrics
from jasr.text.tokenizers import normalise


def text_scores(refs, hyps, normalisation="none"):
    """Word and character error rates of hypotheses.

    Args:
      refs, hyps: lists of texts of equal length.
      normalisation: one of the NORMALISATIONS, through which both sides go.

    Returns:
      (what `metrics.wer` says, normalised refs, normalised hyps).
    """
    refs, hyps = ([normalise(text, normalisation) for text in side] for side in (refs, hyps))
    return metrics.wer(refs, hyps), refs, hyps
