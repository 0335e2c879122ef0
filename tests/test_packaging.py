"""setup.py, Makefile and .ci/run as a stranger's clone will use them."""

import ast
import os
import re
import runpy
import subprocess
import sys
import types

import pytest

# Names of distributions whose modules are called otherwise.
DISTRIBUTION = {
    "orbax": "orbax-checkpoint",
    "absl": "absl-py",
    "yaml": "pyyaml",
    "ml_collections": "ml-collections",
    "espeakng_loader": "espeakng-loader",
    "IPython": "ipykernel",
}
COMES_WITH_THE_CORE = {"ml_dtypes", "scipy", "tensorstore"}


@pytest.fixture(scope="module")
def setup_arguments(root):
    """What setup.py tells setuptools."""
    told = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.setup = lambda **arguments: told.update(arguments)
    stand_in.find_namespace_packages = lambda include: list(include)
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stand_in
    try:
        runpy.run_path(str(root / "setup.py"))
    finally:
        sys.modules.pop("setuptools")
        if before is not None:
            sys.modules["setuptools"] = before
    return told


@pytest.fixture(scope="module")
def tracked(root):
    """Path -> text of every tracked text file; every file of the folders, without git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        paths = [root / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("jasr", "experiments", "configs", "tests", "third_party", ".ci")
        paths = [p for folder in folders for p in (root / folder).rglob("*")]
        paths += [p for p in root.iterdir() if p.suffix in (".py", ".md", ".toml", "")]
    texts = {}
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            try:
                texts[path.relative_to(root)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    assert len(texts) > 10
    return texts


def names(requirements):
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in requirements}


def test_core_is_light_and_the_extras_are_there(setup_arguments):
    core, extras = names(setup_arguments["install_requires"]), setup_arguments["extras_require"]
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections"} <= core
    assert not core & {"torch", "lhotse", "transformers", "espeakng-loader", "tensorboardx"}
    assert set(extras) == {"data", "hf", "torch", "tts", "tb", "gpu", "tpu", "dev", "all"}
    assert {"lhotse", "urllib3"} <= names(extras["data"])
    for name in ("data", "hf", "torch", "tts", "tb"):
        assert names(extras[name]) <= names(extras["all"])
    assert not [line for line in extras["all"] if line.startswith("jax")]
    assert setup_arguments["python_requires"] == ">=3.11,<3.14"


def test_jax_and_flax_have_no_upper_limit(setup_arguments):
    for line in setup_arguments["install_requires"]:
        assert "<" not in line and "==" not in line


def test_version_is_the_package_s(setup_arguments):
    import jasr

    assert setup_arguments["version"] == jasr.__version__


def test_every_package_that_is_imported_is_declared(root, setup_arguments):
    declared = names(setup_arguments["install_requires"]) | COMES_WITH_THE_CORE
    for requirements in setup_arguments["extras_require"].values():
        declared |= names(requirements)
    own = {"jasr", "experiments", "configs"}
    for package in sorted(own):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    imported = [node.module]
                else:
                    continue
                for name in {name.split(".")[0] for name in imported}:
                    if name not in sys.stdlib_module_names and name not in own:
                        wanted = DISTRIBUTION.get(name, name).lower()
                        assert wanted in declared, f"{path.relative_to(root)}:{node.lineno}: {name}"


def test_every_core_requirement_is_imported_somewhere(tracked, setup_arguments):
    module = {distribution: name for name, distribution in DISTRIBUTION.items()}
    source = "\n".join(text for path, text in tracked.items() if path.suffix == ".py")
    for name in names(setup_arguments["install_requires"]):
        wanted = module.get(name, name)
        assert re.search(rf"^\s*(import|from) {wanted}\b", source, re.MULTILINE), name


def test_no_tracked_file_names_a_machine_s_paths_or_a_package_index(tracked):
    machine = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/\w")
    index = re.compile(r"https?://\S*(?:/simple\b|/whl\b)|(?:extra-)?index-url[= ]+http")
    for path, text in tracked.items():
        for number, line in enumerate(text.splitlines(), 1):
            assert not machine.search(line), f"{path}:{number}: {line.strip()}"
            assert not index.search(line), f"{path}:{number}: {line.strip()}"


def test_no_recording_is_tracked_but_the_synthetic_sample(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    audio = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".sph", ".m4a")
    for name in listed.stdout.splitlines():
        assert not name.lower().endswith(audio) or name.startswith("tests/data/"), name


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_name_a_version_of_every_requirement_that_fits(root, setup_arguments, python):
    """Else `make test` would fail before the first test, or take what nobody tested."""
    from packaging.requirements import Requirement

    def here(lines):
        found = map(Requirement, lines)
        return [r for r in found if not r.marker or r.marker.evaluate({"python_version": python})]

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in here(line for line in lines if not line.startswith("#")):
        (pin,) = line.specifier
        assert pin.operator == "==" and line.name.lower() not in pinned, line
        pinned[line.name.lower().replace("_", "-")] = pin.version
    extras = setup_arguments["extras_require"]
    for wanted in here([*setup_arguments["install_requires"], *extras["all"], *extras["dev"]]):
        assert pinned[wanted.name.lower()] in wanted.specifier, wanted


def test_makefile_has_the_targets(root):
    text = (root / "Makefile").read_text(encoding="utf-8")
    targets = "venv test test-newest constraints quickstart lint bench clean"
    for target in targets.split():
        assert re.search(rf"^{target}:", text, re.MULTILINE), target


def test_ci_runs_make_test(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"\bmake\b.* test\b", script.read_text(encoding="utf-8"))


def test_licence_is_apache_2(root, setup_arguments):
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text
    assert setup_arguments["license"] == "Apache-2.0"
