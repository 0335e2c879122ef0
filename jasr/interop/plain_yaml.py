"""NeMo's YAML as plain data: read within limits, references resolved, OmegaConf's objects undone.

Nothing is constructed but dict, list, str, int, float, bool and None, by the rules of OmegaConf's
own loader: "1e-5" is a number, a date is text, a key that stands twice is an error. PyYAML comes
with Orbax.
"""

import itertools
import re

from jasr.interop.pickles import Opaque

LARGEST = 8 << 20  # bytes; a config with 8192 pieces three times has 250 kB
MOST_NODES = 200_000  # with every alias and reference written out
DEEPEST = 60
LONGEST = 1 << 16  # characters that references in a text may make of it
MISSING = "???"  # OmegaConf's mark of a value that is yet to be given
_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq".split())
_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.[\d_]+([eE][-+]?\d+)?)$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class YamlError(ValueError):
    """The text is not YAML of plain data, or its references lead nowhere."""


def load(data):
    """The plain data of YAML text (bytes in UTF-8).

    Raises:
      YamlError: damage, a tag (`!!python/object` ...), an anchor that refers to itself, or more
        nodes than any config has.
    """
    import yaml

    if len(data) > LARGEST:
        raise YamlError(f"{len(data)} bytes of YAML, more than the {LARGEST} allowed")
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is six times as fast
    try:
        text = data.decode("utf-8")
        _check(yaml.parse(text, base))
        return yaml.load(text, _loader(base))
    except yaml.YAMLError as e:
        raise YamlError(f"not YAML of plain data: {' '.join(str(e).split())}") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise YamlError(f"not YAML of plain data: {e}") from e


def _check(events):
    """YamlError for a tag and for more nodes than a config has; an alias is all it stands for."""
    import yaml

    sizes, inside, nodes = {}, [], 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise YamlError(f"the anchor {event.anchor!r} is not there before, or holds itself")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            if event.tag not in (None, *_TAGS):
                raise YamlError(f"refused: the tag {event.tag!r}; a config is plain data")
            inside.append((event.anchor, nodes))
            nodes += 1
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            sizes[anchor] = nodes - before
        if nodes > MOST_NODES or len(inside) > DEEPEST:
            raise YamlError(f"more than {MOST_NODES} nodes or {DEEPEST} levels")


def dump(data):
    """YAML text in UTF-8 that this loader, PyYAML's and OmegaConf's read alike."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, _):
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    text = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8")


def _loader(base):
    """The loader's class; made here since PyYAML is imported where it is used."""

    class Loader(base):
        def construct_mapping(self, node, deep=False):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key.value, str)]
            if len(set(keys)) != len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise YamlError(f"the key {twice[1]!r} stands there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return Loader


# ---- references ----------------------------------------------------------------------------------


def resolve(config, names):
    """{name: config[name]} for those `names` that are there, with OmegaConf's references
    "${a.b}", "${.sibling}", "${a.${b}}" and "text ${a}" replaced by what they stand for, and
    without the keys whose value is "???".

    A path begins at the config or, as in the recipes that the config is a part of, at
    {"model": config}.

    Raises:
      YamlError: lists every key whose reference leads nowhere, to "???", to itself, or calls a
        function ("${oc.env:HOME}"; none is ever called).
    """
    resolver = _Resolver(config)
    found = {name: resolver.value(config[name], (name,)) for name in names if name in config}
    if resolver.problems:
        raise YamlError("references of the config: " + "; ".join(resolver.problems))
    return {name: value for name, value in found.items() if value != MISSING}


class _Resolver:
    def __init__(self, config):
        self.config, self.problems, self.nodes, self.pending = config, [], 0, []

    def value(self, value, where):
        """The value at path `where` with everything in it resolved."""
        self.nodes += 1
        if self.nodes > MOST_NODES or len(where) > DEEPEST:
            raise YamlError(f"the config's references make more than {MOST_NODES} nodes of it")
        if isinstance(value, dict):
            items = ((key, self.value(v, (*where, key))) for key, v in value.items())
            return {key: v for key, v in items if not (isinstance(v, str) and v == MISSING)}
        if isinstance(value, list):
            return [self.value(v, (*where, number)) for number, v in enumerate(value)]
        return self.text(value, where) if isinstance(value, str) and "${" in value else value

    def text(self, text, where):
        while match := re.search(r"\$\{([^${}]*)\}", text):
            found = self.refer(match[1].strip(), where)
            if match[0] == text:
                return found
            if isinstance(found, dict | list):
                return self.problem(where, match[1], "is no text")
            if len(text) + len(str(found)) > LONGEST:
                raise YamlError(f"the config's references make more than {LONGEST} letters")
            text = text[: match.start()] + str(found) + text[match.end() :]
        return text

    def refer(self, path, where):
        if ":" in path:
            return self.problem(where, path, "calls a function, which is not done here")
        steps = [step for step in re.split(r"[.\[\]]+", path) if step]
        dots = len(path) - len(path.lstrip("."))
        if dots:
            steps, roots = [*where[:-dots], *steps], (self.config,)
        else:
            roots = (self.config, {"model": self.config})
        given = True
        for root in roots:
            found, value = self.walk(root, steps)
            if found and isinstance(value, str) and value == MISSING:
                given = False
            elif found:
                if steps in self.pending or len(self.pending) > DEEPEST:
                    return self.problem(where, path, "leads back to itself")
                self.pending.append(steps)
                value = self.value(value, tuple(steps))
                self.pending.pop()
                return value
        return self.problem(where, path, "leads nowhere" if given else "was never given")

    def walk(self, node, steps):
        """(whether it is there, the value) at the end of `steps` from `node`."""
        for number, step in enumerate(steps):
            if isinstance(node, str) and "${" in node and len(self.pending) <= DEEPEST:
                self.pending.append(steps)
                node = self.text(node, tuple(steps[:number]))
                self.pending.pop()
            if isinstance(node, list) and str(step).isdigit() and int(step) < len(node):
                node = node[int(step)]
            elif isinstance(node, dict) and step in node:
                node = node[step]
            else:
                return False, None
        return True, node

    def problem(self, where, path, what):
        self.problems.append(f"{'.'.join(map(str, where))}: ${{{path}}} {what}")
        return None


# ---- OmegaConf -----------------------------------------------------------------------------------


def plain(value, depth=0, count=None):
    """The plain data of a pickled OmegaConf config, as `pickles` reads it: DictConfig, ListConfig
    and their nodes become what they hold. Objects of other classes stay as they are.

    Raises:
      YamlError: more nodes or levels than any config has (a pickle can hold itself).
    """
    count = itertools.count(1) if count is None else count
    if depth > DEEPEST or next(count) > MOST_NODES:
        raise YamlError(f"more than {MOST_NODES} nodes or {DEEPEST} levels")
    if isinstance(value, Opaque) and value.name.startswith("omegaconf."):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val")), depth + 1, count)
    if isinstance(value, Opaque) and value.name.endswith(".AttributeDict"):  # Lightning's
        value = dict(value.items)
    if isinstance(value, dict):
        return {key: plain(v, depth + 1, count) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1, count) for v in value]
    return value
