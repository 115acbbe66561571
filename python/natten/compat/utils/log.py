# SPDX-License-Identifier: MIT
"""Eras 0.17 to 0.21: loggers. NATTEN_LOG_LEVEL is debug, info, warning (the default), error or critical;
NATTEN_LOG_PIPE is stdout, stderr (the default), a file, or /dev/null. Nothing is logged while torch.compile traces.
"""

import logging
import os
import sys

import torch

_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


def _get_log_level() -> int:
    return _LEVELS.get(os.environ.get("NATTEN_LOG_LEVEL", "").strip().lower(), logging.WARNING)


def _get_log_pipe():
    """A stream, the path of a file that can be written, or None."""
    pipe = os.environ.get("NATTEN_LOG_PIPE") or "stderr"
    if pipe.lower() in ("stdout", "stderr"):
        return getattr(sys, pipe.lower())
    if pipe == os.devnull:
        return None
    try:
        with open(pipe, "a"):
            return pipe
    except OSError:
        return None


class NattenLogger:
    """A logger of the standard library with a level and one handler from the environment."""

    def __init__(self, name: str):
        self.logger = logging.getLogger(name)
        self.log_level = _get_log_level()
        self.logger.setLevel(self.log_level)
        self.logger.propagate = False
        for handler in self.logger.handlers[:]:
            self.logger.removeHandler(handler)
            handler.close()
        pipe = _get_log_pipe()
        handler = logging.FileHandler(pipe) if isinstance(pipe, str) else logging.StreamHandler(pipe)
        self.handler = logging.NullHandler() if pipe is None else handler
        self.handler.setLevel(self.log_level)
        self.handler.setFormatter(logging.Formatter(_FORMAT))
        self.logger.addHandler(self.handler)

    def is_safe_to_log(self) -> bool:
        return not torch.compiler.is_compiling()

    def _log(self, level: int, message, *arguments, **options) -> None:
        if self.is_safe_to_log():
            self.logger.log(level, message, *arguments, **options)

    def debug(self, message, *arguments, **options) -> None:
        self._log(logging.DEBUG, message, *arguments, **options)

    def info(self, message, *arguments, **options) -> None:
        self._log(logging.INFO, message, *arguments, **options)

    def warning(self, message, *arguments, **options) -> None:
        self._log(logging.WARNING, message, *arguments, **options)

    def error(self, message, *arguments, **options) -> None:
        self._log(logging.ERROR, message, *arguments, **options)


def get_logger(name: str) -> NattenLogger:
    return NattenLogger(name)
