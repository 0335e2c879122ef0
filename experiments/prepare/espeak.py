"""Speech from text through espeak-ng: a library call for corpora, a worker process underneath.

espeak-ng carries noise state from one utterance to the next, and nothing in its interface resets
it: the same text twice in one process is not the same audio twice, but the n-th utterance of a
fresh process always is. So a batch of utterances is spoken by a process of its own, this file run
as a script with the standard library alone (40 ms to start).

The library comes from the wheel `espeakng-loader` (extra `[tts]`) and is loaded with ctypes.
"""

import base64
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

SAMPLE_RATE = 22050

_DATA_PATH_LIMIT = 140  # espeak-ng keeps the path of its data in 160 bytes


class Say(NamedTuple):
    """One utterance: words, who speaks them, how fast and how high."""

    text: str
    voice: str  # accent+variant, e.g. "en-gb+f3"
    rate: int  # words a minute, 80 to 450
    pitch: int  # 0 to 99, 50 is the voice's own


class EspeakError(RuntimeError):
    """espeak-ng is not installed, does not load, or does not know a voice."""


def speak(utterances: Sequence[Say]) -> list[bytes]:
    """The audio of each utterance: native-endian int16[S] at 22,050 Hz, as bytes.

    The same sequence always gives the same bytes; each utterance depends on those before it.
    Raises EspeakError without the extra `[tts]`, or with a voice that espeak-ng does not have.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise EspeakError("speech synthesis needs espeak-ng: pip install 'jasr[tts]'")
    # -P: this folder's modules must not stand in front of the standard library's
    ran = subprocess.run(
        [sys.executable, "-P", os.path.abspath(__file__)],
        input=json.dumps(utterances).encode(),
        capture_output=True,
    )
    if ran.returncode != 0:
        last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EspeakError(f"espeak-ng stopped with status {ran.returncode}: {' '.join(last)}")
    return [base64.b64decode(pcm) for pcm in json.loads(ran.stdout)]


# The worker. The constants are those of espeak-ng's speak_lib.h.

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_CHARS_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def _worker() -> None:
    """Reads a JSON list of Say from standard input; writes one of their audio in base64."""
    import espeakng_loader

    utterances = [Say(*row) for row in json.load(sys.stdin)]
    lib = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    with tempfile.TemporaryDirectory() as folder:
        data = str(espeakng_loader.get_data_path())
        if len(os.fsencode(data)) > _DATA_PATH_LIMIT:
            os.symlink(data, os.path.join(folder, "espeak-ng-data"))
            data = os.path.join(folder, "espeak-ng-data")
        rate = lib.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
        if rate != SAMPLE_RATE:
            raise EspeakError(f"espeak-ng does not start from its data in {data} (status {rate})")

        spoken, chunks = [], []

        @_CALLBACK
        def collect(samples, count, events):
            if samples and count > 0:
                chunks.append(ctypes.string_at(samples, 2 * count))
            return 0

        lib.espeak_SetSynthCallback(collect)
        variants = set(os.listdir(os.path.join(data, "voices", "!v")))
        lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath noise: otherwise seeded by the clock
        for say in utterances:
            chunks.clear()
            if not variants.issuperset(say.voice.split("+")[1:]):
                # espeak-ng would speak on without the variant
                raise EspeakError(f"espeak-ng has no voice variant {say.voice!r}")
            _say(lib, say)
            spoken.append(base64.b64encode(b"".join(chunks)).decode())
        print(json.dumps(spoken))
        lib.espeak_Terminate()


def _say(lib: ctypes.CDLL, say: Say) -> None:
    """Speaks one utterance into the callback."""
    if lib.espeak_SetVoiceByName(say.voice.encode()) != 0:
        raise EspeakError(f"espeak-ng has no voice {say.voice!r}")
    lib.espeak_SetParameter(_RATE, say.rate, 0)
    lib.espeak_SetParameter(_PITCH, say.pitch, 0)
    text = say.text.encode() + b"\0"
    status = lib.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, _CHARS_UTF8, None, None)
    if status != 0 or lib.espeak_Synchronize() != 0:
        raise EspeakError(f"espeak-ng cannot speak {say.text!r} (status {status})")


if __name__ == "__main__":
    _worker()
