"""Seeded damage: to bytes, text, JSON and Python objects.

Every function takes the intact content and a generator and gives damaged content. Those that know a format repair
its checksums and compression around the damage, so that it reaches the code behind them.
"""

import copy
import json
import struct

import numpy as np

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 32767, 65535, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, 2**63 - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e-320, 1e30, 3e38, -0.0]
TOKENS = [
    *("0", "-1", "1e999", "-1e308", "nan", "inf", "99999999999", "9" * 30, "9" * 5000, "1e9", "0x10", "1_0"),
    *(
        "",
        " ",
        "\t",
        "\n",
        "\r",
        "\x00",
        "\x1b[31m",
        "\xff",
        "é",
        '"',
        "'",
        "{",
        "}",
        "[",
        "]",
        "[[",
        ",",
        ":",
    ),
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
    for magic in (
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"IDAT",
        b"IEND",
        b"IHDR",
        b"\xff\xda",
        b"OHDR",
        b"TREE",
    ):
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
    values = [
        None,
        True,
        -1,
        0,
        10**7,
        2**31,
        2**63,
        2**64,
        10**40,
        1.5,
        float("nan"),
        float("inf"),
        -1e308,
        1e308,
        1e-320,
    ]
    values += [
        "",
        "x",
        "\x1b[31m",
        "\ud800",
        "x" * 5000,
        *NAMES,
        [],
        {},
        [[]],
        [1, "a"],
        {"a": 1},
        [None] * 3,
    ]
    values += [deep_list(30), deep_list(200), [0.0] * 7, [float("nan")] * 6, [[1.0] * 4] * 4, "0" * 40]
    if not is_json:
        values += [
            doubling(),
            doubling(list),
            endless_list(),
            b"",
            b"\xff",
            (1, 2),
            {1},
            np.zeros(0),
            np.ones((4, 4)),
        ]
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
