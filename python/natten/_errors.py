# SPDX-License-Identifier: MIT
"""Turns what leaves an op into Python's exceptions: only the one sentence of the core, under the right class.

Torch up to 2.13 lets a C++ exception arrive as ValueError, later ones as RuntimeError with a trace behind the first
line; so the core marks its sentences with `natten[kind]` and the class is chosen here.
"""

import re

_TAGGED = re.compile(r"natten\[(invalid_argument|unsupported|cuda)\] ([^\n]*)")
_CLASSES = {"invalid_argument": ValueError, "unsupported": NotImplementedError, "cuda": RuntimeError}


class WrongType(TypeError, ValueError):
    """An argument of a wrong type: TypeError as everywhere in Python, and ValueError because clients of the original,
    which raises that, may catch it."""


def translated(error: Exception, device: str, backend: str | None = None) -> Exception:
    """The exception to raise for one that an op raised; `error` itself if it is not ours.

    A backend that the caller has named and that cannot run is a bad argument, hence ValueError; the same answer to a
    call without a backend is NotImplementedError.
    """
    tagged = _TAGGED.search(str(error))
    if tagged:
        kind, sentence = tagged.groups()
    elif isinstance(error, NotImplementedError) and "natten::" in str(error):  # the dispatcher has no kernel for it
        kind = "unsupported"
        sentence = f"this build of natten has no engine for {device} tensors: see `python -m natten info`"
    else:
        return error
    if kind == "unsupported" and backend is not None:
        return ValueError(f"backend {backend!r} cannot run this call: {sentence}")
    return _CLASSES[kind](sentence)
