"""Word error rate of a model on a manifest, as its users would transcribe it, with a report."""

import json
import math
import time

import numpy as np

from jasr import metrics, text
from jasr.recognition.recognizer import Recognizer
from jasr.systems import loading

DURATION_EDGES = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)  # s
COUNTS = ("word_errors", "words", "char_errors", "chars")  # of an utterance


def evaluate(task, variables, manifest, *, normalisation="", meta=None, limit=0, **settings):
    """Transcribes a manifest and scores it.

    Every usable utterance counts once; those that are not are listed under "left_out". Texts and
    hypotheses are normalised alike before they are compared. Utterances longer than the window go
    through in several, as in a transcription.

    Args:
      manifest: a NeMo manifest, CutSet or Shar directory, or a list of them.
      normalisation: "none", "lower", "whisper_english"; "" = the tokenizer's.
      meta: the checkpoint's.
      limit: score only so many utterances, the first ones; 0 = all.
      settings: window, overlap, batch_seconds of `recognizer.Recognizer`.

    Returns:
      dict, JSON-able but for NaN: wer, cer, their 95 % intervals, counts, by_duration, speed,
      means of the model's own totals (updates_per_utterance), window (s), cut (utterances longer
      than it), left_out and `utterances` (one dict each, in the manifest's order).
    """
    from jasr import data

    decoder = loading.verb(task, "transcribe")
    kind = normalisation or decoder.tokenizer.normalisation
    text.normalise("", kind)  # an unknown kind is refused before any work
    rate = decoder.sample_rate  # an empty text counts too: what is heard there is wrong
    config = data.DataConfig(sample_rate=rate, cache_audio=False, min_tokens=0)
    layout = data.AudioText(config, rate, decoder.tokenizer.encode)
    source = data.open_eval(config, manifest, layout)
    texts = [source.item(n).fields["text"] for n in range(len(source.ids))]
    recognizer = Recognizer(task, variables, meta=meta, **settings)
    chosen = set(range(len(texts))[: limit or None])
    order = []
    start = time.perf_counter()
    stream = recognizer.each(_rows(source, chosen, order))
    stream = metrics.progress(stream, total=len(chosen), label="evaluating")
    results = {order[n]: result for n, result in enumerate(stream)}
    wall = time.perf_counter() - start - recognizer.compile_seconds
    failed = {n: r["error"] for n, r in results.items() if "error" in r} | dict(source.failed)
    kept = [n for n in sorted(results) if n not in failed]
    if not any(texts[n].strip() for n in kept):
        first = next(iter(failed.values()), "")
        others = f"; {len(failed)} could not be transcribed, e.g. {first}" if failed else ""
        raise ValueError(
            f"{manifest}: {len(kept)} utterances without a word{others}: nothing to score"
        )
    columns = ([results[n][k] for n in kept] for k in ("text", "duration"))
    report = score([texts[n] for n in kept], *columns, kind)
    utterances = report.pop("utterances")
    for row, n in zip(utterances, kept, strict=True):
        row.update(id=source.ids[n], **{name: results[n][name] for name in decoder.totals})
    means = {f"{name}_per_utterance": words for name, words in decoder.totals.items()}
    for name in decoder.totals:
        report[f"{name}_per_utterance"] = float(np.mean([row[name] for row in utterances]))
    seconds = sum(r["duration"] for r in results.values())
    window = recognizer.windows.length / recognizer.sample_rate
    left_out = [f"{source.ids[n]}: {reason}" for n, reason in sorted(failed.items())]
    left_out += [f"{bad.source}:{bad.line}: {bad.audio}: {bad.reason}" for bad in source.bad]
    return report | {
        "means": means,
        "window": round(window, 3),
        "cut": sum(results[n]["duration"] > window for n in kept),
        "left_out": left_out,
        "audio_seconds": round(seconds, 2),
        "seconds": round(wall, 3),
        "compile_seconds": round(recognizer.compile_seconds, 3),
        "real_time_factor": wall / seconds if seconds else math.nan,
        "utterances": utterances,
    }


def _rows(source, chosen, order):
    """Yields the samples of an Eval's utterances, noting their numbers in `order`."""
    for _, batch in source.iterate():
        for row, index in enumerate(batch["index"].tolist()):
            if index in chosen:
                order.append(index)
                yield batch["audio"][row, : batch["audio_len"][row]]


def score(refs, hyps, durations, normalisation="none"):
    """Error rates of texts with intervals, by duration and for each utterance."""
    result, refs, hyps = text.text_scores(refs, hyps, normalisation)
    counts = result.pop("per_utterance")
    low, high = metrics.interval(counts[:, 0], counts[:, 1])
    char_low, char_high = metrics.interval(counts[:, 2], counts[:, 3])
    return {
        "num_utterances": len(refs),
        **result,
        "wer_interval": [low, high],
        "cer_interval": [char_low, char_high],
        "empty": sum(bool(r) and not h for r, h in zip(refs, hyps, strict=True)),
        "normalisation": normalisation,
        "by_duration": by_duration(counts, durations),
        "utterances": [
            {"duration": float(d), "ref": r, "hyp": h, **dict(zip(COUNTS, c, strict=True))}
            for r, h, d, c in zip(refs, hyps, durations, counts.tolist(), strict=True)
        ],
    }


def by_duration(counts, durations):
    """Error rates of the utterances in each span of DURATION_EDGES that has any."""
    number, rows = np.digitize(durations, DURATION_EDGES), []
    for n in np.unique(number):
        total = counts[number == n].sum(axis=0)
        rows.append(
            {
                "from": DURATION_EDGES[n - 1],
                "to": DURATION_EDGES[n],
                "utterances": int((number == n).sum()),
                "words": int(total[1]),
                "wer": metrics.rate(total[0], total[1]),
                "cer": metrics.rate(total[2], total[3]),
            }
        )
    return rows


def compare(report, baseline):
    """Paired bootstrap of a report against an earlier one on the same utterances.

    Returns:
      as `metrics.compare`, with a = baseline and b = report.

    Raises:
      ValueError: the reports are not of the same utterances with the same texts.
    """
    mine, theirs = ({u["id"]: u for u in r["utterances"]} for r in (report, baseline))
    for one, other in ((mine, theirs), (theirs, mine)):  # reports of before left empty texts out
        for i in [i for i, u in one.items() if i not in other and not u["ref"]]:
            del one[i]
    if mine.keys() != theirs.keys():
        only = sorted(mine.keys() ^ theirs.keys())
        raise ValueError(f"reports of different utterances: {len(only)} in one alone: {only[:3]}")
    differing = [i for i in mine if mine[i]["ref"] != theirs[i]["ref"]]
    if differing:
        raise ValueError(f"reports with different references, e.g. of {differing[0]}")
    columns = [[r[i]["word_errors"] for i in mine] for r in (theirs, mine)]
    return metrics.compare(*columns, [mine[i]["words"] for i in mine])


def lines(report):
    """The report for people: rates with intervals, by duration, speed, what was left out."""

    def percent(x):
        return f"{100 * x:.2f} %"

    low, high = report["wer_interval"]
    char_low, char_high = report["cer_interval"]
    yield f"WER {percent(report['wer'])} [{percent(low)}, {percent(high)}]   " + (
        f"{report['word_errors']} of {report['words']} words: {report['sub']} substituted, "
        f"{report['ins']} inserted, {report['del']} deleted"
    )
    yield f"CER {percent(report['cer'])} [{percent(char_low)}, {percent(char_high)}]"
    for row in report["by_duration"]:
        yield f"  {row['from']:g} to {row['to']:g} s: WER {percent(row['wer'])}, " + (
            f"{row['utterances']} utterances, {row['words']} words"
        )
    yield (
        f"normalisation {report['normalisation']}, {report['empty']} empty hypotheses"
        + "".join(f", {report[name]:.1f} {words}" for name, words in report["means"].items())
    )
    yield (
        f"{report['audio_seconds']:.0f} s of audio in {report['seconds']:.1f} s: real-time factor "
        f"{report['real_time_factor']:.4f} (compiling, apart: {report['compile_seconds']:.1f} s)"
    )
    if report["cut"]:
        yield (
            f"{report['cut']} utterances are longer than {report['window']:g} s and were seen in "
            "windows of that length (--window)"
        )
    if report["left_out"]:
        yield f"left out: {len(report['left_out'])}, e.g. {report['left_out'][0]}"


def last_line(report, label=""):
    """The one line that says it all."""
    what = f" of {label}" if label else ""
    return f"WER {100 * report['wer']:.2f} % on {report['num_utterances']} utterances{what}"


def dump(report, path):
    """Writes a report as JSON; NaN and infinity become null."""
    plain = json.loads(json.dumps(report), parse_constant=lambda name: None)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(plain, f, indent=1, ensure_ascii=False)
        f.write("\n")
