"""The room works for any layout: several pieces an item, several items a line, several axes."""

import dataclasses
import json

import numpy as np
import pytest

from jasr.data import DataConfig, DataError, index, open_eval, open_evals, open_train, plan
from jasr.data.config import ItemError
from jasr.data.entries import piece_of
from jasr.seam import Item, Piece
from tests.corpora import encode, layout, make_corpus, noise, write_lines

CFG = DataConfig(batch_duration=6.0, num_buckets=2, num_threads=0, check="none", max_bad_share=1.0)


class Turns:
    """A layout of two recordings an item, a question in between, two items a line."""

    axes = ("turns", "frames", "tokens")
    draws = True

    def items(self, values):
        if "question" not in values:
            raise DataError("missing key: question")
        parts = [piece_of(values | {"audio_filepath": f}) for f in values["files"]]
        for side in "ab":
            yield Item(
                f"{values['id']}-{side}", tuple(parts), {"question": values["question"] + side}
            )

    def sizes(self, item, scored):
        return (
            len(item.pieces),
            sum(p.seconds for p in item.pieces) * 10,
            len(item.fields["question"]),
        )

    def for_set(self, seconds, exact):
        return self

    def drawn(self, sizes, words):
        found = np.ceil(sizes).astype(np.int64)
        found[:, 1] += 3 if words is None else (words[:, 0] % np.uint64(4)).astype(np.int64)
        return found, np.full_like(found, [0, 1, 1])

    def cost(self, sizes):
        sizes = np.asarray(sizes, float)
        return sizes[..., 1] + sizes[..., 2] ** 2

    def label(self, bucket):
        return " x ".join(map(str, bucket))

    def empty(self, bucket):
        rows, turns, frames, tokens = bucket
        return {"turns": np.zeros((rows, turns, 2)), "index": np.full(rows, -1, np.int64)}

    def fill(self, batch, row, items, words):
        at = 0
        for n, item in enumerate(items):
            for piece in item.pieces:
                if piece.source.endswith("gone"):
                    raise ItemError(n, "missing file")
                batch["turns"][row, at] = piece.seconds, words[n, 0] % np.uint64(4)
                at += 1


@pytest.fixture
def lines(tmp_path):
    rows = [
        {
            "id": f"l{i}",
            "files": [f"{i}a", f"{i}b"],
            "duration": 1.0 + i % 7,
            "question": "x" * (i % 5),
        }
        for i in range(20)
    ]
    rows += [{"id": "none"}, {"id": "lost", "files": ["gone"], "duration": 1.0, "question": "y"}]
    cfg = dataclasses.replace(CFG, batch_cost=400.0, length_multiple=1, token_multiple=2)
    return dataclasses.replace(cfg, train=(write_lines(tmp_path / "m.jsonl", rows),))


def test_three_axes_with_a_quadratic_cost_make_buckets_and_batches(lines):
    cfg, data = lines, open_train(dataclasses.replace(lines, concat=2), Turns(), 0)
    found = data.index
    assert len(found) == 42 and [b.reason for b in found.bad] == ["missing key: question"]
    pieces = tuple(Piece(p.source, seconds=2.0) for p in found.pieces_of(3))
    assert found.item(3) == Item("l1-b", pieces, {"question": "xb"})
    assert pieces[1].source.endswith("/1b")
    costs = Turns().cost(np.array(data.shapes)[:, 1:])
    assert [b for b, *_ in data.shapes] == [max(1, int(cfg.batch_cost // c)) for c in costs]
    epoch = data.plan.epoch(0)
    for j, bucket in enumerate(epoch.bucket):
        inside = epoch.members[epoch.begin[j] : epoch.begin[j + 1]]
        assert (epoch.rows.sizes[inside] <= data.shapes[bucket][1:]).all()
    seen, two = set(), 0
    for _, (_, _, batch) in zip(range(len(epoch.bucket)), data.iterate(), strict=False):
        seen |= set(batch["index"].tolist())
        two += int((batch["turns"][..., 0] > 0).sum())
    assert two == 80, "both pieces of each item but the lost ones"
    assert set(data.failed.values()) == {"missing file"} and len(data.failed) == 2


def test_draws_of_an_item_differ_between_epochs_and_come_again(lines):
    p = open_train(lines, Turns(), 0).plan
    drawn = [dict(zip(*(x.tolist() for x in (r.item, r.words[:, 0])), strict=True)) for r in
             (p.epoch(e).rows for e in (0, 1, plan.PERIOD))]  # fmt: skip
    assert drawn[0] == drawn[2] and all(drawn[0][i] != drawn[1][i] for i in drawn[0])


def test_items_are_repeats_only_if_pieces_and_fields_are_equal(tmp_path):
    line = {"audio_filepath": "a.wav", "duration": 1.0, "text": "one"}
    rows = [
        line,
        line | {"text": "two"},
        line | {"id": "named"},
        line | {"id": "x", "text": "three"},
    ]
    rows += [line | {"id": "x", "text": "four"}, line | {"id": "x", "text": "three"}]
    path = write_lines(tmp_path / "m.jsonl", rows)
    found = index.build(path, layout(CFG), CFG)
    assert [found.item(i).fields["text"] for i in range(len(found))] == ["one", "two", "three"]
    assert found.id(0) == "a.wav" and found.id(1).startswith("a.wav#") and found.id(2) == "x"
    said = {b.line: b.reason for b in found.bad}
    assert said == {
        3: "duplicate: line 1 says the same",
        5: "duplicate id: line 4 has it for something else",
        6: "duplicate: line 4 says the same",
    }
    old = index.build(path, layout(CFG), CFG, version=2)
    assert len(old) == 1 and "duplicate audio: as in line 1" in {b.reason for b in old.bad}


def test_rows_are_filled_from_memory_as_from_files(corpus):
    data = open_eval(CFG, corpus[0], layout(CFG))
    batch, samples = data.layout.empty((2, 16000, 40)), noise(0.5, 1).astype(np.float32)
    item = Item("live", (Piece(samples),), {"text": "ab"})
    data.layout.fill(batch, 0, [item], np.zeros((1, 2), np.uint64))
    np.testing.assert_array_equal(batch["audio"][0, :8000], samples)
    assert batch["audio_len"].tolist() == [8000, 0] and batch["tokens"][0, :2].tolist() == encode(
        "ab"
    )
    with open(data.item(0).pieces[0].source, "rb") as f:
        opened = data.item(0)._replace(pieces=(Piece(f),))
        data.layout.fill(
            batch := data.layout.empty((1, 32000, 40)), 0, [opened], np.zeros((1, 2), np.uint64)
        )
    assert batch["audio_len"][0] == round(data.durations[0] * 16000)
    with pytest.raises(ItemError, match="too long for its row"):
        data.layout.fill(data.layout.empty((1, 100, 4)), 0, [item], np.zeros((1, 2), np.uint64))


def test_named_sets_share_their_buckets(tmp_path):
    sets = {name: make_corpus(tmp_path, n, seed=n)[0] for name, n in (("a", 12), ("b", 5))}
    found = open_evals(CFG, sets, layout(CFG))
    assert found["a"].shapes == found["b"].shapes
    for name, count in (("a", 12), ("b", 5)):
        seen = [i for _, batch in found[name].iterate() for i in batch["index"] if i >= 0]
        assert sorted(seen) == list(range(count))


def test_facts_of_a_plan_survive_json_and_name_the_setting_that_changed(corpus):
    def facts(cfg, seed=0):
        cfg = dataclasses.replace(cfg, train=(corpus[0],))
        return json.loads(json.dumps(open_train(cfg, layout(cfg), seed).facts()))

    old = facts(CFG)
    assert not plan.changes(old, facts(dataclasses.replace(CFG, num_threads=3)))
    del old["batch_cost"]  # a setting that was not there yet
    assert not plan.changes(old, facts(CFG))
    said = plan.listed(plan.changes(old, facts(dataclasses.replace(CFG, speeds=(0.9, 1.0)), 1)))
    speeds = "config.data.speeds (it was [1.0], now it is [0.9, 1.0])"
    assert said == f"config.seed (it was 0, now it is 1), {speeds}"
