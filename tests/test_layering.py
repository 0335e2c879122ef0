"""Imports point down only, the core stays light, and only public JAX is used (ARCHITECTURE.md)."""

import ast
import re
import subprocess
import sys

import pytest

# The rooms from the ground up: a room imports those of lower levels and itself, no room beside it.
# A system's folder is a room of its own: nobody but experiments imports it, and by name only.
LEVELS = (
    "seam settings tree metrics compilation_cache",
    "sharding",
    "audio text",
    "losses layers interop",
    "models",
    "decoding",
    "data checkpoint",
    "systems.source systems.compatibility systems.catalogue systems.loading",
    "training recognition averaging",
    "systems.lact systems.fastconformer",
)
ROOMS = {f"jasr.{room}": n for n, level in enumerate(LEVELS) for room in level.split()}

# At the top of a core module. ml_dtypes and absl come with JAX and Orbax.
LIGHT = {"jax", "flax", "optax", "orbax", "numpy", "ml_dtypes", "absl", "jasr"}
LIGHT |= set(sys.stdlib_module_names)

# Imported inside the functions that need them.
HEAVY = (
    "torch transformers lhotse grain soundfile scipy jiwer sentencepiece tokenizers safetensors "
    "tensorboardX ml_collections espeakng_loader tqdm"
).split()


def modules(root, package):
    """Module name -> syntax tree, of every file of a package."""
    trees = {}
    for path in sorted((root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imports(tree, top_level=False):
    """Dotted names that are imported, and names from them: `from a import b` is a and a.b."""
    nodes = top_level_nodes(tree) if top_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def top_level_nodes(tree):
    """The nodes that run at import: everything outside functions and `if __name__` blocks."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def within(name, package):
    return name == package or name.startswith(package + ".")


def room_of(module):
    """The most specific of ROOMS that a module of jasr lies in; None for empty packages."""
    return max((room for room in ROOMS if within(module, room)), key=len, default=None)


def test_imports_point_down(root):
    trees = modules(root, "jasr")
    broken = set()
    for module, tree in trees.items():
        room = room_of(module)
        assert room or module in ("jasr", "jasr.systems"), f"{module} lies in no room of LEVELS"
        for name in imports(tree) & set(trees):
            below = room_of(name)
            same_level = "systems" in LEVELS[ROOMS[room]] and ROOMS[room] == 7 if room else False
            if (
                below in (None, room)
                or ROOMS[below] < ROOMS[room]
                or (same_level and ROOMS[below] == 7)
            ):
                continue
            broken.add(f"{module} imports {name}")
    assert not broken, "\n".join(sorted(broken))


def test_no_shared_room_asks_what_system_it_works_for(root):
    """No member is asked for, and no name of a system compared, outside of the systems' folders."""
    from jasr.systems import catalogue

    names = [n for s in catalogue.every() for n in (s.name, *s.old_names) if n != "ctc"]
    asks = re.compile(
        r"\b(has|get)attr\((self\.)?(task|system|model|layout|encoder|config)\b"
        rf"|(==|!=|\bin) *\(?['\"]({'|'.join(names)})['\"]"
    )
    own = tuple(f"jasr.{room}." for room in LEVELS[-1].split())
    found = []
    for package in ("jasr", "experiments"):
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            if module.startswith(own):
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{module}:{n}: {x}" for n, x in enumerate(lines, 1) if asks.search(x)]
    assert not found, "\n".join(found)


def test_nothing_in_jasr_imports_experiments_configs_or_tests(root):
    above = ("experiments", "configs", "tests")
    for module, tree in modules(root, "jasr").items():
        for name in imports(tree):
            assert name.split(".")[0] not in above, f"{module} imports {name}"


def test_configs_import_only_settings(root):
    allowed = {"jasr", "configs", "ml_collections", "dataclasses", "warnings"}
    for module, tree in modules(root, "configs").items():
        for name in imports(tree):
            assert name.split(".")[0] in allowed, f"{module} imports {name}"


def test_core_modules_import_only_light_packages_at_the_top(root):
    heavy = [
        f"{module} imports {name}"
        for module, tree in modules(root, "jasr").items()
        for name in imports(tree, top_level=True)
        if name.split(".")[0] not in LIGHT
    ]
    assert not heavy, "\n".join(heavy)


@pytest.mark.parametrize("package", ["jasr", "experiments", "configs"])
def test_only_public_jax_is_used(root, package):
    for module, tree in modules(root, package).items():
        used = imports(tree)
        used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for private in ("jax._src", "jax.core", "jax.interpreters", "jax.lib", "jaxlib"):
            assert not [name for name in used if within(name, private)], f"{module}: {private}"


def printed(program, root):
    """What a program prints in a fresh interpreter."""
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\n")[0]


def test_every_core_module_loads_nothing_heavy(root):
    names = list(modules(root, "jasr"))
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    assert printed(program, root) == ""


def test_import_jasr_does_not_even_load_jax(root):
    program = "import jasr, sys; print(*[m for m in ('jax', 'numpy') if m in sys.modules])"
    assert printed(program, root) == ""
