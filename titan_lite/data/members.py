"""Reads compressed files of several members."""

import io
from collections.abc import Callable
from typing import Any


def open_members(file: str, new: Callable[[], Any]) -> io.BufferedReader:
    """Opens all members of a compressed file, as pbzip2 and pixz write them.

    new: makes a decompressor of one member.
    """
    return io.BufferedReader(_Members(file, new))


class _Members(io.RawIOBase):
    """The content of all members; Python's readers end silently at a later one that is damaged."""

    def __init__(self, file: str, new: Callable[[], Any]) -> None:
        self._file, self._new, self._member = io.FileIO(file), new, new()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            is_between, rest = self._member.eof, b""
            if is_between or self._member.needs_input:
                rest, self._rest = self._rest or self._file.read(io.DEFAULT_BUFFER_SIZE), b""
                if not rest and is_between:
                    return 0
                if not rest:
                    raise EOFError("Compressed file ended before the end-of-stream marker")
            if is_between:
                # Members may be padded with zeros.
                if not (rest := rest.lstrip(b"\0")):
                    continue
                self._member = self._new()
            content = self._member.decompress(rest, len(buffer))
            if self._member.eof:
                self._rest = self._member.unused_data
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
