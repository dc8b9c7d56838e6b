"""Where the members of a tar archive are, from its headers alone.

Python's tarfile gives up silently at a damaged header and reads headers of any size; here the first is said and the
second refused. Formats: ustar, GNU long names, pax (https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html).
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_LONGEST_EXTRA = 1 << 20  # bytes of a long name or of pax attributes
_REGULAR, _LONG_NAME, _PAX = (b"0", b"\0", b"7"), b"L", b"x"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_SKIPPED = (b"g", b"K")  # attributes of all members; long targets of links


class Member(NamedTuple):
    """A regular file: its data are `size` bytes from `start` on."""

    name: bytes
    start: int
    size: int


class CutShort(ValueError):
    """The archive is damaged or ends early; the members before that are whole."""


def members(file: BinaryIO, length: int) -> Iterator[Member]:
    """The regular files of an archive of `length` bytes, in order; links, devices and folders are left out.

    CutShort (where, and why) at the first damaged header, at a member that ends behind the archive's end, and where the
    archive has no end mark.
    """
    at, extra = 0, {}
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise CutShort(f"it ends at byte {min(at, length)} without an end mark")
        if not any(header):
            return
        kind = header[156:157]
        size = _size(header, at) if kind not in _WITHOUT_DATA else 0
        if kind not in (_LONG_NAME, _PAX, *_SKIPPED):
            size = extra.get("size", size)
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise CutShort(f"it ends at byte {length}, inside of a member that ends at byte {start + size}")
        if kind in (_LONG_NAME, _PAX):
            extra |= _extra(kind, file, start, size)
        elif kind not in _SKIPPED:
            if kind in _REGULAR:
                yield Member(extra.get("name") or _name(header), start, size)
            extra = {}


def _size(header: bytes, at: int) -> int:
    """Bytes of a member's data; CutShort where the header's sum is wrong or this field is no number."""
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise CutShort(f"its header at byte {at} is damaged") from error
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" ") or size < 0:
        raise CutShort(f"its header at byte {at} is damaged")
    return size


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _extra(kind: bytes, file: BinaryIO, start: int, size: int) -> dict:
    """What precedes a member whose name or size has no room in its header."""
    if size > _LONGEST_EXTRA:
        raise CutShort(f"its header at byte {start - _BLOCK} has {size} bytes of attributes")
    file.seek(start)
    data = file.read(size)
    return {"name": data.rstrip(b"\0")} if kind == _LONG_NAME else _pax(data, start)


def _pax(data: bytes, start: int) -> dict:
    """Name and size out of lines "LENGTH KEY=VALUE\\n"."""
    found, at = {}, 0
    try:
        while at < len(data):
            space = data.index(b" ", at)
            end = at + int(data[at:space])
            key, _, value = data[space + 1 : end - 1].partition(b"=")
            if end <= space:
                raise ValueError("a line of no length")
            at = end
            if key == b"path":
                found["name"] = value
            elif key == b"size":
                found["size"] = int(value)
    except ValueError as error:
        raise CutShort(f"its attributes at byte {start} are damaged") from error
    if found.get("size", 0) < 0:
        raise CutShort(f"its attributes at byte {start} are damaged")
    return found
