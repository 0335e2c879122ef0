"""NeMo's YAML: plain data by OmegaConf's rules, bombs refused, references resolved."""

import pytest

from jasr.interop import plain_yaml
from jasr.interop.pickles import Opaque
from jasr.interop.plain_yaml import YamlError
from tests.systems.fastconformer.nemo_models import KINDS, config_of

# pieces of vocabularies that mean something else to YAML
PIECES = (
    "on n y ~ ??? 1 1.5 1e5 1e-3 +1 1. .5 -.inf .nan 12:30 2020-01-01 0x1f 0o7 1_000 null True "
    "= << - # &a *a !t % @ ` | > { [ ' \" ▁ é"
).split()


def test_what_is_written_is_read_back(goldens):
    data = {"pieces": [*PIECES, "", " ", "a: b", "\u2028"], "x": [1e-5, 1.0, -2, True, None]}
    assert plain_yaml.load(plain_yaml.dump(data)) == data
    for name in KINDS:
        config = config_of(goldens, name)
        assert plain_yaml.load(plain_yaml.dump(config)) == config


def test_pyyaml_reads_what_is_written_alike():
    import yaml

    data = {"pieces": PIECES, "x": [1e-5, 1.0, -2, True, None]}
    assert yaml.safe_load(plain_yaml.dump(data)) == data


def test_numbers_are_omegaconfs_and_dates_are_text():
    read = plain_yaml.load(b"a: 1e-5\nb: 1E+3\nc: 2020-01-01\nd: .5\ne: 0.\nf: off\ng: 017")
    assert read == {"a": 1e-5, "b": 1e3, "c": "2020-01-01", "d": 0.5, "e": 0.0, "f": False, "g": 15}


def test_anchors_are_read():
    read = plain_yaml.load(b"a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}")
    assert read == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def test_bombs_are_refused_early(monkeypatch):
    laughs = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
    )
    merges = b"a0: &a0 {x: 1}\n" + b"".join(
        b"a%d: &a%d {<<: [%s]}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9))
        for n in range(1, 12)
    )
    for bomb, reason in {  # of deep nesting either this loader or PyYAML is the first to complain
        laughs: "more than 200000 nodes",
        merges: "more than 200000 nodes",
        b"a: &a [*a]": "holds itself",
        b"[" * 5000: "levels|not YAML",
        b"a: " * 5000: "not YAML",
        b"- " * 5000: "levels|not YAML",
        b"? " * 5000: "levels|not YAML",
        b"a: " + b"9" * 5000: "not YAML",
        b"x" * (plain_yaml.LARGEST + 1): "bytes of YAML",
        b"a: \xff": "not YAML",
        b"a: 1\na: 2": "'a' stands there twice",
        b"{[1]: 2}: 3": "not YAML",
        b"a: b\n---\nc: d": "not YAML",
        b"a: !!timestamp 2020-01-01": "refused: the tag",
        b"%TAG ! tag:yaml.org,2002:python/\na: !name:os.system ''": "refused: the tag|not YAML",
    }.items():
        with pytest.raises(YamlError, match=reason):
            plain_yaml.load(bomb)


def resolved(**config):
    return plain_yaml.resolve(config, list(config))


def test_references_are_replaced_from_either_root():
    config = {
        "size": 3,
        "a": {
            "b": "${size}", "c": "${model.size}", "d": "${.b}", "e": "${..size}", "l": [7, "${.0}"]
        },
        "t": "x${size}-${a.b}",
        "n": "${a.${key}}",
        "key": "b",
        "whole": "${a}",
        "item": "${a.l[0]}",
        "given": {"x": "???", "y": ["???"]},
    }  # fmt: skip
    got = resolved(**config)
    a = {"b": 3, "c": 3, "d": 3, "e": 3, "l": [7, 7]}
    assert got["a"] == got["whole"] == a
    assert (got["t"], got["n"], got["item"]) == ("x3-3", 3, 7)
    assert got["given"] == {"y": ["???"]}  # a piece of a vocabulary
    assert plain_yaml.resolve(config, ["t", "nothing"]) == {"t": "x3-3"}


def test_references_that_lead_nowhere_are_all_named():
    with pytest.raises(YamlError) as error:
        resolved(
            a="${b}", b="${a}", c={"d": "${x.y}"}, e="${oc.env:HOME}", f="${g}", g="???", h="${c} x"
        )
    for reason in (
        "a: ${b} leads back to itself",
        "c.d: ${x.y} leads nowhere",
        "e: ${oc.env:HOME} calls a function",
        "f: ${g} was never given",
        "h: ${c} is no text",
    ):
        assert reason in str(error.value), str(error.value)


def test_references_cannot_make_a_bomb():
    lists = {f"a{n}": [f"${{a{n + 1}}}"] * 9 for n in range(12)} | {"a12": 1}
    with pytest.raises(YamlError, match="more than 200000 nodes"):
        resolved(**lists)
    texts = {f"a{n}": f"${{a{n + 1}}}" * 9 for n in range(12)} | {"a12": "x" * 100}
    with pytest.raises(YamlError, match="more than 65536 letters"):
        resolved(**texts)
    deep = {f"a{n}": f"${{a{n + 1}}}" for n in range(500)} | {"a500": 1}
    with pytest.raises(YamlError, match="leads back to itself|more than"):
        resolved(**deep)


def test_pickled_configs_that_hold_themselves_are_refused():
    node = Opaque("omegaconf.dictconfig.DictConfig", state={"_content": {}})
    node.state["_content"]["x"] = node
    with pytest.raises(YamlError, match="levels"):
        plain_yaml.plain(node)
    wide = [1] * 10
    for _ in range(8):
        wide = [wide] * 10
    with pytest.raises(YamlError, match="nodes"):
        plain_yaml.plain(wide)
    attributes = Opaque("lightning.AttributeDict", items=[("cfg", {"a": (1, 2)})])
    assert plain_yaml.plain(attributes) == {"cfg": {"a": [1, 2]}}
