"""jasr: speech recognition and speech language models in JAX and Flax.

The public face, loaded at first use so that `import jasr` costs nothing:

    model = jasr.from_pretrained("runs/an4")          # or an imported model's directory
    model.transcribe(["a.wav", "b.flac"])             # [{"text", "words", "duration", ...}]
    jasr.transcribe("runs/an4", ["a.wav"])            # both in one call
    params = jasr.load_params("runs/an4")             # numpy tree, on any machine
    params = jasr.average([params_a, params_b], weights=[0.3, 0.7])
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "average": "jasr.averaging",
    "from_pretrained": "jasr.recognition.recognizer",
    "load_params": "jasr.checkpoint",
    "transcribe": "jasr.recognition.recognizer",
}
__all__ = ["average", "from_pretrained", "load_params", "transcribe"]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jasr' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
