"""Tables of a foreign section: both ways, problems named, nothing raised by what a file says."""

import pytest

from jasr import settings
from jasr.interop.sections import MUST, UNSAID, Row, Table, complete, read, write


@settings.section
class Config:
    layers: int = settings.field(2, least=1, most=10)
    width: int = 8
    hidden: int = 32
    heads: int = 4
    bias: bool = True
    rate: float = 0.1
    norm: str | None = settings.field(None, choices=(None, "batch"))
    sizes: tuple = (1, 2)
    steps: int = 0


def multiple(hidden, values):
    if hidden % values["width"]:
        raise ValueError(f"no multiple of {values['width']}")
    return hidden


TABLE = Table(
    "net",
    Config,
    (
        Row("num_layers", "layers", 3),
        Row("width", usual=MUST),
        Row("inner.hidden", usual=16, read=multiple),
        Row("num_heads", "heads", 4),
        Row("num_key_heads", "heads", write=None),  # must say the same
        Row("bias"),
        Row("rate", read={None: 0.0}, write={0.0: None}),
        Row("norm"),
        Row("sizes"),
        Row(("seconds", "samples"), "steps", (0.5, None),
            lambda both, _: both[1] or int(both[0] * 100), lambda n, _: (UNSAID, n)),
        Row("ours.rate", "rate", wins=True, write=None),
    ),
    target="theirs.modules.Net",
    only_as={"rope": (False, None)},
    silent=("kernel",),
    also={"fused": True},
)  # fmt: skip


def problems_of(section):
    problems = []
    assert (read(TABLE, section, problems) is None) == bool(problems)
    return problems


def test_a_section_is_read_with_their_defaults_and_written_into_what_the_file_had():
    section = {
        "width": 8,
        "rate": None,
        "sizes": [3, [4]],
        "seconds": 2,
        "kernel": "any",
        "rope": None,
    }
    problems = []
    values = read(TABLE, section, problems)
    assert not problems and values == {
        "layers": 3, "width": 8, "hidden": 16, "heads": 4, "rate": 0.0, "sizes": (3, (4,)),
        "steps": 200,
    }  # fmt: skip
    full = complete(Config, values, "net", problems)
    assert full["bias"] is True and full["norm"] is None  # our own defaults
    before = {"kernel": 7, "fused": False, "inner": {"more": 1}}
    assert write(TABLE, full, before) == {
        "_target_": "theirs.modules.Net", "kernel": 7, "fused": False, "num_layers": 3, "width": 8,
        "inner": {"more": 1, "hidden": 16}, "num_heads": 4, "bias": True, "rate": None,
        "norm": None, "sizes": [3, [4]], "samples": 200,
    }  # fmt: skip
    assert write(TABLE, full)["fused"] is True  # where the file says nothing


def test_rows_of_one_field_agree_but_for_one_that_wins():
    assert problems_of({"width": 8, "num_heads": 2, "num_key_heads": 2}) == []
    (problem,) = problems_of({"width": 8, "num_heads": 2, "num_key_heads": 4})
    assert problem == "net.num_key_heads is 4, where another key says 2"
    assert read(TABLE, {"width": 8, "rate": 0.5, "ours": {"rate": 0.25}}, [])["rate"] == 0.25


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, "net.width is missing"),
        ({"width": 8, "new": 1}, "net.new is 1, which is not known here"),
        ({"width": 8, "rope": True}, "net.rope is True, which is not known here"),
        ({"width": 8, "inner": {"x": 1}}, "net.inner.x is 1, which is not known here"),
        ({"width": 8, "inner": 3}, "net.inner is 3, not a mapping"),
        ({"width": 8, "inner": {"hidden": 9}}, "net.inner.hidden is 9, no multiple of 8"),
        ({"width": "8"}, "net.width is '8', not an integer up to 1048576"),
        ({"width": True}, "net.width is True, not an integer up to 1048576"),
        ({"width": 1 << 21}, "net.width is 2097152, not an integer up to 1048576"),
        ({"width": 8, "num_layers": 11}, "net.num_layers is 11, must be at least 1 and at most 10"),
        ({"width": 8, "norm": "x"}, "net.norm is 'x', must be one of None, 'batch'"),
        ({"width": 8, "norm": 1}, "net.norm is 1, not a string or null"),
        ({"width": 8, "rate": float("inf")}, "net.rate is inf, not a number"),
        ({"width": 8, "sizes": [1, "2"]}, "net.sizes is [1, '2'], not a list"),
        ({"width": 8, "bias": 1}, "net.bias is 1, not true or false"),
        ({"_target_": "os.system"}, "net._target_ is 'os.system'; known is Net"),
        (None, "the config has no section 'net'"),
        ([8], "net is [8], not a mapping"),
    ],
)
def test_a_problem_names_the_key_and_the_value(section, problem):
    assert problems_of(section) == [problem]


def test_all_problems_are_listed_and_no_value_raises():
    wrong = {"num_layers": 0, "width": None, "new": 1, "bias": "yes", "inner": {"hidden": 16}}
    assert len(problems_of(wrong)) == 4  # inner.hidden needs width, which is listed already
    values = (None, 0, -1, 1e300, 10**400, float("nan"), "x", [], [None], {}, {"a": [1]}, True, b"")
    for key in {key for row in TABLE.rows for key in row.keys} | {"inner", "rope", "_target_", 3}:
        for value in values:
            problems_of({"width": 8, key: value})
