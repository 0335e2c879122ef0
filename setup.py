"""Packaging of jasr: a light core and one extra for every heavy or optional companion.

The core trains, evaluates and transcribes. torch is in no core requirement: on Linux its default
wheel brings some 20 CUDA packages with it. `data` brings torch (lhotse depends on it).
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

FACE = Path(__file__).parent / "jasr" / "__init__.py"
VERSION = re.search(r'__version__ = "(.+?)"', FACE.read_text(encoding="utf-8"))[1]

CORE = (
    "jax>=0.10",
    "flax>=0.12",
    # Seen to fail: jax 0.11 with flax up to 0.12.6 (no jax.core.get_opaque_trace_state at the first
    # module), jax 0.11.1 with flax 0.12.7 and 0.12.8 (no hijax.MutableHiType in flax.nnx). jax 0.11
    # and later need Python 3.12, where pip therefore takes a flax that fits.
    'flax>=0.12.9; python_version >= "3.12"',
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "numpy>=2.0",
    "ml-collections>=1.0",
    "absl-py>=2.1",
    "soundfile>=0.13",  # its wheels carry libsndfile: WAV, FLAC, OGG and MP3 without ffmpeg
    "sentencepiece>=0.2.1",
    "pyyaml>=6.0",
    "jiwer>=4.0",
    "tqdm>=4.66",
)

EXTRAS = {
    "data": ("lhotse>=1.31", "urllib3>=2.0"),  # lhotse imports urllib3 without declaring it
    "hf": ("transformers>=5.0", "safetensors>=0.5", "tokenizers>=0.22"),
    "torch": ("torch>=2.8",),
    "tts": ("espeakng-loader>=0.2.4",),
    "tb": ("tensorboardX>=2.6",),
}
EXTRAS["all"] = tuple(sorted({package for extra in EXTRAS.values() for package in extra}))
# Not in `all`: what needs a device, and what only developers need.
EXTRAS["gpu"] = ("jax[cuda13]>=0.10",)
EXTRAS["tpu"] = ("jax[tpu]>=0.10",)
EXTRAS["dev"] = (
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.17,<0.18",  # a test runs it, and other versions judge otherwise
    "nbclient>=0.10",
    "nbformat>=5.10",
    "ipykernel>=6.29",
)

setup(
    name="jasr",
    version=VERSION,
    description="Speech recognition and speech language models in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",  # jax 0.10 needs 3.11, jax 0.11 needs 3.12: pip picks the match
    packages=find_namespace_packages(
        include=("jasr", "jasr.*", "experiments", "experiments.*", "configs", "configs.*")
    ),
    install_requires=list(CORE),
    extras_require={name: list(packages) for name, packages in EXTRAS.items()},
)
