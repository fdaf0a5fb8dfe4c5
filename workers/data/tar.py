"""The tar walk: the samples of a WebDataset shard, with the byte range and digest of each.

Python's tarfile ends without a word at a cut or damaged header (38 % of all truncations of a shard), so
this walk demands every byte: whole records, the end-of-archive marker, and zeros after it. Nothing is
decoded, unpickled or extracted here; only regular files in plain archives are accepted.
"""

import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from blake3 import blake3

from workers.errors import DataError

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_MEMBER_BYTES = 256 << 20
"""A stream reads a sample whole, so a larger member could not be trained on anyway."""
MAX_EXTENSION_BYTES = 1 << 20
"""Of a PAX or GNU long-name header."""
MAX_SAMPLE_BYTES = 512 << 20
"""All files of a sample together, for the same reason."""
MAX_NAME = 4096
"""Characters of a member's name."""
META = re.compile(r"__[^/]*__($|/)")
"""Members that stock webdataset skips."""

LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX_LOCAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (LONG_NAME, LONG_LINK, *PAX_LOCAL, tarfile.XGLTYPE)
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class UnusableShard(DataError):
    """What is wrong is in the shard itself; the message begins with its name."""


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    is_file: bool
    """Else a directory."""
    offset: int
    """Of its first header, in bytes from the start of the archive."""
    data_offset: int
    size: int
    """Of its data, in bytes."""
    record: bytes
    """All of it: headers, data, padding."""

    @property
    def data(self) -> bytes:
        start = self.data_offset - self.offset
        return self.record[start : start + self.size]


@dataclass(slots=True)
class TarSample:
    key: str
    offset: int
    size: int = 0
    """Bytes from `offset` to the end of its last member's padding."""
    digest: bytes = b""
    """The first 16 bytes of blake3 of that range."""
    files: dict[str, Member] = field(default_factory=dict)
    """By extension, in small letters as stock webdataset has them."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension by webdataset's rule: the basename's first dot parts them; None: no sample's file."""
    directory, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or META.match(name):
        return None
    return directory + slash + stem, extension.lower()


def samples(shard: str, pieces: Iterable[bytes]) -> Iterator[TarSample]:
    """The archive's samples in order; DataError names `shard` and the key that is at fault."""
    seen: set[str] = set()
    current: TarSample | None = None
    running = blake3()
    for member in walk(shard, pieces):
        parts = split_name(member.name) if member.is_file else None
        if parts and (current is None or parts[0] != current.key):
            if current:
                yield current
            if parts[0] in seen:
                raise UnusableShard(
                    f"{shard}: the files of sample {parts[0]!r} do not stand together (a duplicate key, or "
                    f"interleaved samples); write the shard anew with each sample's files in a row"
                )
            seen.add(parts[0])
            current = TarSample(parts[0], member.offset)
            running = blake3()
        # What lies amid a sample is in its range, what follows it is not: so a digest after each file.
        running.update(member.record)
        if parts and current:
            if parts[1] in current.files:
                raise UnusableShard(f"{shard}: sample {current.key!r} has two files named {member.name!r}")
            current.files[parts[1]] = member
            current.size = member.offset + len(member.record) - current.offset
            if current.size > MAX_SAMPLE_BYTES:
                raise UnusableShard(
                    f"{shard}: sample {current.key!r} has more than {MAX_SAMPLE_BYTES} bytes, which a "
                    f"stream would have to hold at once; are dots in the names part of its key?"
                )
            current.digest = running.digest(length=16)
    if current:
        yield current


def walk(shard: str, pieces: Iterable[bytes]) -> Iterator[Member]:
    """Every member of the archive whose bytes are `pieces`; DataError if any byte is missing or wrong."""
    source = _Source(shard, pieces)
    shared: dict[str, str] = {}
    while member := _next_member(source, shared):
        yield member
    source.finish()


class _Source:
    """Exact reads from an iterator of byte strings; holds one piece and one member."""

    def __init__(self, shard: str, pieces: Iterable[bytes]) -> None:
        self.shard = shard
        self.offset = 0
        self._pieces = iter(pieces)
        self._buffer = b""
        self._at = 0

    def take(self, length: int, what: str) -> bytes:
        if len(self._buffer) - self._at < length:
            self._fill(length)
        data = self._buffer[self._at : self._at + length]
        if len(data) < length:
            self.fail(f"truncated at byte {self.offset + len(data)}, inside {what}; copy or write it again")
        self._at += length
        self.offset += length
        return data

    def _fill(self, length: int) -> None:
        parts = [self._buffer[self._at :]]
        missing = length - len(parts[0])
        while missing > 0 and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            missing -= len(piece)
        self._buffer, self._at = b"".join(parts), 0

    def finish(self) -> None:
        """After the first zero block: the second one, then nothing but padding."""
        if self.take(BLOCK, "the end-of-archive marker") != ZEROS:
            self.fail(f"damaged: a lone zero block before byte {self.offset}")
        end = self.offset
        for piece in itertools.chain([self._buffer[self._at :]], self._pieces):
            end += len(piece)
            if piece.strip(b"\0"):
                self.fail("bytes after its end-of-archive marker (two archives in one file?); write it again")
        if end % BLOCK:
            self.fail(f"truncated at byte {end}, inside its padding; copy or write it again")

    def fail(self, reason: str) -> NoReturn:
        raise UnusableShard(f"{self.shard}: {reason}")


def _next_member(source: _Source, shared: dict[str, str]) -> Member | None:
    """None at the first zero block. `shared` holds the PAX fields of global headers so far."""
    offset, long_name = source.offset, ""
    blocks: list[bytes] = []
    own: dict[str, str] = {}
    while True:
        block = source.take(BLOCK, "a header or without an end-of-archive marker")
        if block == ZEROS:
            if blocks:
                source.fail(f"damaged: the header at byte {offset} extends no member")
            return None
        blocks.append(block)
        header = _header(source, block)
        if header.type not in EXTENSIONS:
            break
        body = _extension(source, header, blocks)
        if header.type == LONG_NAME:
            long_name = body.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif header.type in PAX_LOCAL:
            own = _pax_fields(source, body)
        elif header.type == tarfile.XGLTYPE:
            shared.update(_pax_fields(source, body))
        if source.offset - offset > 4 * MAX_EXTENSION_BYTES:
            source.fail(f"more than {4 * MAX_EXTENSION_BYTES} bytes of header extensions from byte {offset}")
    fields = {**shared, **own}
    name = fields.get("path") or long_name or header.name
    if len(name) > MAX_NAME:
        source.fail(f"the name of the member at byte {offset} has {len(name)} characters")
    if ".." in name.split("/"):
        source.fail(f"member {name!r} would lie outside of the archive")
    is_file = header.type in FILES
    size = _size(source, name, fields.get("size", header.size)) if is_file else 0
    if not is_file and header.type != tarfile.DIRTYPE:
        kind = REFUSED.get(header.type, f"a member of the unknown type {header.type!r}")
        source.fail(f"member {name!r} is {kind}; only plain files can be samples")
    if any(key.startswith("GNU.sparse.") for key in fields):
        source.fail(f"member {name!r} is a sparse file; only plain files can be samples")
    data_offset = source.offset
    blocks.append(source.take(-(-size // BLOCK) * BLOCK, f"member {name!r}"))
    return Member(name, is_file, offset, data_offset, size, b"".join(blocks))


def _header(source: _Source, block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        if source.offset == BLOCK:
            hint = (
                " (compressed?)" if block.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5")) else ""
            )
            source.fail(f"not a plain tar archive{hint}; ranged reads need one")
        source.fail(f"damaged header at byte {source.offset - BLOCK}: {error}; copy or write it again")


def _extension(source: _Source, header: tarfile.TarInfo, blocks: list[bytes]) -> bytes:
    if not 0 <= header.size <= MAX_EXTENSION_BYTES:
        source.fail(f"a header extension of {header.size} bytes before byte {source.offset}")
    padded = source.take(-(-header.size // BLOCK) * BLOCK, "a header extension")
    blocks.append(padded)
    return padded[: header.size]


def _pax_fields(source: _Source, body: bytes) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n`, the length counting itself; of these, what matters here."""
    fields, at = {}, 0
    while at < len(body):
        digits, space, _ = body[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not (space and key and equals) or body[at + length - 1 : at + length] != b"\n":
            source.fail(f"damaged PAX header before byte {source.offset}; copy or write it again")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            fields[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += length
    return fields


def _size(source: _Source, name: str, size: int | str) -> int:
    if isinstance(size, str) and not (size.isascii() and size.isdigit() and len(size) < 20):
        source.fail(f"member {name!r} has the size {size!r}")
    if not 0 <= int(size) <= MAX_MEMBER_BYTES:
        source.fail(f"member {name!r} has {size} bytes; a sample's file may have {MAX_MEMBER_BYTES}")
    return int(size)
