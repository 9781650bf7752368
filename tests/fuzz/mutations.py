"""Seeded damage: to bytes, text, JSON, Python objects, pickles, archives, PNG, Matlab and xz files.

Every function takes the intact content and a generator and gives damaged content. Those that know a format repair
its checksums and compression around the damage, so that it reaches the code behind them.
"""

import copy
import io
import json
import lzma
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib

import numpy as np

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 32767, 65535, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, 2**63 - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e-320, 1e30, 3e38, -0.0]
TOKENS = [
    *("0", "-1", "1e999", "-1e308", "nan", "inf", "99999999999", "9" * 30, "9" * 5000, "1e9", "0x10", "1_0"),
    *("", " ", "\t", "\n", "\r", "\x00", "\x1b[31m", "\xff", "é", '"', "'", "{", "}", "[", "]", "[[", ",", ":"),
    *("null", "true", "NaN", "x" * 300, "../../../etc/passwd", "/etc/passwd", "C:\\x", "%s%n", "\ud800"),
]
NAMES = [
    *("../secret.npy", "../../../../etc/passwd", "/etc/passwd", "a\\..\\b", "C:\\x", "a\0b", "", ".", ".."),
    *("\ud800", "\x1b[2J", "x" * 300, "con", "a/b", "~", "$HOME", "é" * 100, "-rf"),
]


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


# ---- Bytes and text


def damage(data: bytes, rng, other: bytes = b"") -> bytes:
    """Truncates, flips bits, overwrites numbers, swaps byte order, deletes, repeats or splices."""
    out = bytearray(data)
    if not out:
        return bytes(pick(rng, [b"", b"\0", b"\n", b"x" * 100]))
    # Headers stand at the start, zip's and xz's at the end; that is where damage means most.
    head = int(pick(rng, [min(32, len(out)), min(128, len(out)), min(400, len(out)), len(out), len(out)]))
    at = int(rng.integers(head))
    if rng.random() < 0.15:
        at = max(len(out) - 1 - int(rng.integers(80)), 0)
    stop = min(len(out), at + int(rng.integers(1, 40)))
    match int(rng.integers(11)):
        case 0:
            del out[int(pick(rng, [at, int(rng.integers(len(out))), *boundaries(data)])) :]
        case 1:
            for place in rng.integers(head, size=rng.integers(1, 6)):
                out[place] ^= 1 << int(rng.integers(8))
        case 2:
            for place in rng.integers(head, size=rng.integers(1, 4)):
                out[place] = int(rng.integers(256))
        case 3 | 4:  # a number of any width, byte order and place
            width = int(pick(rng, [1, 2, 4, 8]))
            value = int(pick(rng, NUMBERS)) % (1 << 8 * width)
            out[at : at + width] = value.to_bytes(width, pick(rng, ["little", "big"]))
        case 5:
            kind = pick(rng, ["<f", ">f", "<d", ">d"])
            value = pick(rng, FLOATS)
            packed = struct.pack(kind, value if "d" in kind or abs(value) < 3.4e38 else float("inf"))
            out[at : at + len(packed)] = packed
        case 6:  # the other byte order
            width = int(pick(rng, [2, 4, 8]))
            end = at + (min(len(out) - at, int(rng.integers(1, 64)) * width)) // width * width
            out[at:end] = b"".join(bytes(out[i : i + width])[::-1] for i in range(at, end, width))
        case 7:
            del out[at:stop]
        case 8:  # a repeated section
            out[at:at] = out[at:stop] * int(pick(rng, [1, 1, 5, 200]))
        case 9:
            cut = int(rng.integers(len(other) + 1))
            out[at:] = other[cut:] if rng.random() < 0.5 else other[cut:] + out[at:]
        case _:
            out[at:stop] = bytes([int(pick(rng, [0, 255, 32, 48]))]) * (stop - at)
    return bytes(out)


def boundaries(data: bytes) -> list[int]:
    """Where the parts of a file meet: after line ends, magic words and blocks."""
    found = [0, 1, 4, 8, 12, 128, len(data) - 1]
    found += [i + 1 for i in range(min(len(data), 600)) if data[i] == 10]
    for magic in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"IDAT", b"IEND", b"IHDR", b"\xff\xda", b"OHDR", b"TREE"):
        start = data.find(magic)
        while start >= 0 and len(found) < 200:
            found += [start, start + 4]
            start = data.find(magic, start + 1)
    return [min(max(i, 0), len(data)) for i in found]


def damage_text(data: bytes, rng, other: bytes = b"") -> bytes:
    """Replaces, drops or repeats words and lines of a text (or of a text header)."""
    if rng.random() < 0.25:
        return damage(data, rng, other)
    head, tail = data[:600], data[600:]
    if rng.random() < 0.3:
        head, tail = data, b""
    lines = head.split(b"\n")
    row = int(rng.integers(len(lines)))
    match int(rng.integers(6)):
        case 0:
            del lines[row]
        case 1:
            lines[row:row] = [lines[row]] * int(pick(rng, [1, 2, 500]))
        case 2:
            other_row = int(rng.integers(len(lines)))
            lines[row], lines[other_row] = lines[other_row], lines[row]
        case _:
            words = lines[row].split(b" ")
            column = int(rng.integers(len(words)))
            words[column] = pick(rng, TOKENS).encode("utf-8", "surrogatepass")
            lines[row] = b" ".join(words)
    return b"\n".join(lines) + tail


# ---- Objects (JSON, pickles) and what they are written as


def deep_list(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def doubling(kind=tuple, depth: int = 64):
    """A structure of `depth` small containers that takes 2^depth steps to walk."""
    value = kind()
    for _ in range(depth):
        value = kind((value, value))
    return value


def endless_list() -> list:
    value: list = []
    value += [value, value, value]
    return value


def strange_values(is_json: bool) -> list:
    values = [None, True, -1, 0, 10**7, 2**31, 2**63, 2**64, 10**40, 1.5, float("nan"), float("inf"), -1e308, 1e308]
    values += ["", "x", "\x1b[31m", "\ud800", "x" * 5000, *NAMES, [], {}, [[]], [1, "a"], {"a": 1}, [None] * 3]
    values += [deep_list(30), deep_list(200), [0.0] * 7, [float("nan")] * 6, [[1.0] * 4] * 4, "0" * 40]
    if not is_json:
        values += [doubling(), doubling(list), endless_list(), b"", b"\xff", (1, 2), {1}, np.zeros(0), np.ones((4, 4))]
        values += [np.array([np.nan]), np.float32(1), np.int64(-5), np.array(["a", "b"]), complex(1, 2)]
        values += [np.zeros((1, 0, 3)), np.bool_(True), np.array(7), 1 << 20000]
    return values


def retype(content, rng, is_json: bool = True):
    """Puts values of another kind into random places of nested containers."""
    content = copy.deepcopy(content)
    for _ in range(int(pick(rng, [1, 1, 1, 2, 4]))):
        node = content
        while isinstance(node, dict | list) and len(node):
            key = pick(rng, list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
            child = node[key]
            if isinstance(child, dict | list) and len(child) and rng.random() < 0.85:
                node = child
                continue
            change = rng.random()
            if change < 0.1:
                del node[key]
            elif change < 0.15 and isinstance(node, list):
                node.extend([child] * int(pick(rng, [1, 300])))
            elif change < 0.2 and isinstance(node, dict):
                node[pick(rng, NAMES)] = node.pop(key)
            else:
                node[key] = pick(rng, strange_values(is_json))
            break
    return content


def damage_json(data: bytes, rng, other: bytes = b"") -> bytes:
    choice = rng.random()
    if choice < 0.6:
        text = json.dumps(retype(json.loads(data), rng))
        encoding = pick(rng, ["ascii", "ascii", "ascii", "utf-8-sig", "utf-16", "utf-32"])
        return text.encode(encoding)
    if choice < 0.75:
        depth = int(pick(rng, [50, 900, 980, 990, 1000, 5000, 100_000]))
        at = int(rng.integers(len(data)))
        return data[:at] + pick(rng, [b"[", b'{"a":']) * depth + data[at:]
    return damage_text(data, rng, other)


def nested_json(data: bytes, depth: int, place) -> bytes:
    """JSON in which a value, chosen by `place`, is a list nested `depth` deep; built as text, for any depth."""
    content = json.loads(data)
    place(content, "@@")
    return json.dumps(content).encode().replace(b'"@@"', b"[" * depth + b"]" * depth)


# ---- Pickles


def damage_pickle(data: bytes, rng, other: bytes = b"") -> bytes:
    """Changes values of the pickled object, or the program itself at opcode boundaries."""
    choice = rng.random()
    if choice < 0.45 and b"torch" not in data:  # the intact file is our own, and of plain objects
        content = retype(pickle.loads(data), rng, is_json=False)
        return pickle.dumps(content, protocol=int(pick(rng, [2, 4, 5])))
    if choice < 0.85:
        return damage_program(data, rng)
    return damage(data, rng, other)


def damage_program(data: bytes, rng) -> bytes:
    places = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    row = int(rng.integers(len(places) - 1))
    start, stop = places[row], places[row + 1]
    match int(rng.integers(5)):
        case 0:
            return data[:start] + data[stop:]
        case 1:
            return data[:start] + data[start:stop] * int(pick(rng, [2, 3, 1000])) + data[stop:]
        case 2:
            return data[:start] + hostile_program(rng) + data[start:]
        case 3:
            return data[:start] + hostile_program(rng) + data[stop:]
        case _:
            a = int(rng.integers(len(places) - 1))
            return data[:start] + data[places[a] : places[a + 1]] + data[stop:]


def hostile_program(rng) -> bytes:
    """A piece of a pickle: calls of what must never run, wrong types, floods."""
    calls = [b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nexec\n", b"cbuiltins\ngetattr\n"]
    calls += [b"csubprocess\nPopen\n", b"cbuiltins\nopen\n", b"cnumpy\nload\n", b"cnumpy.f2py\nexec\n", b"cio\nopen\n"]
    calls += [b"ccollections\nOrderedDict\n", b"cbuiltins\nbytearray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"]
    calls += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n", b"cbuiltins\nset\n"]
    calls += [b"cpathlib\nPosixPath\n", b"cbuiltins\ncomplex\n", b"cnumpy.core.multiarray\nscalar\n"]
    arguments = [b")", b"(S'touch MARK'\nt", b"(I1\nt", b"(N", b"(lp0\nt", b"(I99999999999\nt", b"(S'f8'\nI0\nI1\nt"]
    others = [b"0", b"2", b"1", b"(", b"t", b"l", b"d", b"}", b"]", b")", b"a", b"e", b"s", b"u", b"b", b"R", b"\x81", b"Q"]
    others += [b"\x92", b"\x93", b"\x94", b"\x97", b"\x98", b"\x82\x01", b"I-1\n", b"Fnan\n", b"L" + b"9" * 5000 + b"L\n"]
    others += [b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"r\xff\xff\xff\xff", b"h\x00", b"."]
    others += [b"X\x03\x00\x00\x00\xed\xa0\x80", b"(i__main__\nx\n", b"Pabc\n", b"\x8f", b"\x90", b"\x91", b"}\x94]\x94"]
    if rng.random() < 0.5:
        return pick(rng, calls) + pick(rng, arguments) + pick(rng, [b"R", b"\x81", b"R0", b""])
    return b"".join(pick(rng, others) for _ in range(int(rng.integers(1, 6))))


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
            name = pick(rng, [*NAMES[:4], "\x1b[2J.npy", "x" * 300 + ".npy", "../" + name, "/" + name, "é.npy"])
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
            names = [b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA"]
            bomb = b"a\0\0" + zlib.compress(bytes(1 << int(pick(rng, [4, 16, 24]))))
            chunks.insert(1 + int(rng.integers(len(chunks))), (pick(rng, names), pick(rng, [bomb, b"", rng.bytes(30)])))
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
    if kind == 15:
        body = zlib.compress(damage(zlib.decompress(body), rng))
    else:
        body = damage(body, rng)
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
