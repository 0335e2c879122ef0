"""jasr: speech recognition and speech language models in JAX and Flax.

The public face, loaded at first use so that `import jasr` costs nothing:

    model = jasr.from_pretrained("runs/an4")          # or an imported model's directory
    model.transcribe(["a.wav", "b.flac"])             # [{"text", "words", "duration", ...}]
    jasr.transcribe("runs/an4", ["a.wav"])            # both in one call
    params = jasr.load_params("runs/an4")             # numpy tree, on any machine
    params = jasr.average([params_a, params_b], weights=[0.3, 0.7])
"""

import importlib
import sys
import types

__version__ = "0.1.0"
__all__ = ["average", "from_pretrained", "load_params", "transcribe"]

_HOMES = {"from_pretrained": "jasr.transcribe", "load_params": "jasr.checkpoint"}
_CALLED_BY_MODULE_NAME = ("average", "transcribe")


class _CallableModule(types.ModuleType):
    """A module that is also its main function: jasr.average(...) is jasr.average.average(...)."""

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(types.ModuleType):
    """Makes the modules that share a public function's name callable, whoever imports them."""

    def __setattr__(self, name, value):
        if name in _CALLED_BY_MODULE_NAME and isinstance(value, types.ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _CALLED_BY_MODULE_NAME:
        return importlib.import_module(f"jasr.{name}")
    raise AttributeError(f"module 'jasr' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
