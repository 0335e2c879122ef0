"""What the file formats share: writing a file whole, and words for files of another kind."""

import contextlib
import os
import typing


class Part(typing.NamedTuple):
    """Bytes of a file."""

    start: int
    size: int


@contextlib.contextmanager
def replacing(path):
    """Context of the path of a partial file, which takes the place of `path` at the end: the file
    appears whole or not at all."""
    partial = f"{os.fspath(path)}.partial"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def other_kind(start, wanted):
    """What a file that is not `wanted` seems to be by its first bytes, and what to do."""
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull`"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "a text file (HTML or JSON), perhaps a failed download"
    return f"not a {wanted} (it begins with {start[:8]!r})"
