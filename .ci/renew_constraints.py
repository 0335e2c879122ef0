"""Prints constraints.txt from environments whose versions were tested.

    python .ci/renew_constraints.py .venv/bin/python py312/bin/python > constraints.txt

Each argument is the Python of an environment, one for each Python version. What all have in the
same version is one line; what differs gets a marker of its Python version.
"""

import json
import subprocess
import sys

HEAD = """\
# The exact versions that `make` installs, so that a release of a package breaks no fresh clone. The
# whole suite is run with those of Python 3.11. `make test-newest` ignores this file, `make
# constraints` writes it anew from the newest of everything.
"""


def frozen(python):
    """(Python version "3.11", {package: version}) of an environment, without jasr itself."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", "--exclude-editable"],
        capture_output=True,
        text=True,
        check=True,
    )
    # "2.13.0" admits "2.13.0+cpu" too
    packages = {p["name"]: p["version"].split("+")[0] for p in json.loads(listed.stdout)}
    kept = {name: v for name, v in packages.items() if name not in ("pip", "setuptools", "wheel")}
    return version.stdout.strip(), kept


def lines(environments):
    """Yields the lines of the file from {Python version: {package: version}}."""
    names = {name.lower().replace("_", "-"): name for env in environments.values() for name in env}
    for _, name in sorted(names.items()):
        have = {
            python: version
            for python, env in environments.items()
            for other, version in env.items()
            if other.lower().replace("_", "-") == name.lower().replace("_", "-")
        }
        versions = sorted(set(have.values()))
        if len(versions) == 1:
            yield f"{name}=={versions[0]}"
            continue
        for python, version in sorted(have.items()):
            yield f'{name}=={version} ; python_version == "{python}"'


if __name__ == "__main__":
    print(HEAD + "\n".join(lines(dict(frozen(python) for python in sys.argv[1:]))))
