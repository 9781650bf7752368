"""Seeded damage to archives, PNG, Matlab and xz files with their checksums repaired, and to any file by its name."""

import io
import lzma
import struct
import warnings
import zipfile
import zlib

from fuzz.mutations import NAMES, damage, damage_json, damage_text, pick
from fuzz.pickle_mutations import damage_pickle

# ---- Archives and compressed files


def read_zip(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_zip(entries, compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, compression
            archive.writestr(info, content)
    return stream.getvalue()


def damage_zip(data: bytes, rng, other: bytes = b"") -> bytes:
    """Damages an entry and packs it again, or the archive's own records."""
    if rng.random() < 0.35:
        return damage(data, rng, other)
    entries = read_zip(data)
    row = int(rng.integers(len(entries)))
    name, content = entries[row]
    compression = zipfile.ZIP_STORED
    match int(rng.integers(8)):
        case 0:
            name = pick(
                rng, [*NAMES[:4], "\x1b[2J.npy", "x" * 300 + ".npy", "../" + name, "/" + name, "é.npy"]
            )
        case 1:
            entries.append((name, content))
        case 2:
            compression = int(pick(rng, [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
            if rng.random() < 0.6:
                packed = write_zip(_with(entries, row, (name, content)), compression)
                return damage(packed, rng, data)
        case 3:
            name, content = entries[int(rng.integers(len(entries)))][0], content
        case _:
            content = damage_pickle(content, rng) if name.endswith(".pkl") else damage(content, rng, other)
    try:
        return write_zip(_with(entries, row, (name, content)), compression)
    except (UnicodeEncodeError, ValueError):
        return damage(data, rng, other)


def _with(entries, row, entry):
    return [*entries[:row], entry, *entries[row + 1 :]]


def damage_xz(data: bytes, rng, other: bytes = b"") -> bytes:
    if rng.random() < 0.4:
        return damage(data, rng, other)
    content = lzma.decompress(data)
    content = damage_zip(content, rng) if content.startswith(b"PK") else damage(content, rng)
    return lzma.compress(content, preset=0)


# ---- PNG and Matlab


def damage_png(data: bytes, rng, other: bytes = b"") -> bytes:
    """Damages a chunk and repairs its checksum."""
    if rng.random() < 0.4:
        return damage(data, rng, other)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    row = int(rng.integers(len(chunks)))
    kind, body = chunks[row]
    match int(rng.integers(5)):
        case 0:
            chunks[row] = (kind, damage(body, rng))
        case 1:
            chunks[0] = (b"IHDR", damage(chunks[0][1], rng)[:13].ljust(13, b"\0"))
        case 2:
            chunks.insert(row, chunks[row])
        case 3:
            names = [
                b"iCCP",
                b"zTXt",
                b"iTXt",
                b"tEXt",
                b"PLTE",
                b"tRNS",
                b"acTL",
                b"fcTL",
                b"fdAT",
                b"eXIf",
                b"gAMA",
            ]
            bomb = b"a\0\0" + zlib.compress(bytes(1 << int(pick(rng, [4, 16, 24]))))
            chunks.insert(
                1 + int(rng.integers(len(chunks))), (pick(rng, names), pick(rng, [bomb, b"", rng.bytes(30)]))
            )
        case _:
            del chunks[row]
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def damage_mat(data: bytes, rng, other: bytes = b"") -> bytes:
    """Damages what the compressed variables of a version 5 file hold, or the file."""
    if rng.random() < 0.3 or data[124:128] != b"\x00\x01IM":
        return damage(data, rng, other)
    parts, at = [], 128
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        parts.append((kind, data[at + 8 : at + 8 + size]))
        at += 8 + size
    row = int(rng.integers(len(parts)))
    kind, body = parts[row]
    body = zlib.compress(damage(zlib.decompress(body), rng)) if kind == 15 else damage(body, rng)
    parts[row] = (kind, body)
    return data[:128] + b"".join(struct.pack("<II", k, len(b)) + b for k, b in parts)


BY_ENDING = {
    ".json": damage_json,
    ".txt": damage_text,
    ".tsv": damage_text,
    ".ply": damage_text,
    ".pcd": damage_text,
    ".npz": damage_zip,
    ".pkl": damage_pickle,
    ".png": damage_png,
    ".mat": damage_mat,
}


def damage_file(name: str, data: bytes, rng, other: bytes = b"") -> bytes:
    """Damages a file in the way that suits its name and content; `other` is another file to splice in."""
    if data.startswith(b"PK"):
        mutate = damage_zip
    elif data.startswith(b"\xfd7zXZ"):
        mutate = damage_xz
    else:
        mutate = BY_ENDING.get(name[name.rfind(".") :].lower(), damage)
    if rng.random() < 0.2:
        mutate = damage
    out = mutate(data, rng, other)
    while out == data or rng.random() < 0.15:
        out = damage(out, rng, other)
    return out
