"""Seeded damage to pickles: to what they hold, and to the program that they are."""

import pickle
import pickletools

from fuzz.mutations import damage, pick, retype


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
    calls = [
        b"cos\nsystem\n",
        b"cposix\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\nexec\n",
        b"cbuiltins\ngetattr\n",
    ]
    calls += [
        b"csubprocess\nPopen\n",
        b"cbuiltins\nopen\n",
        b"cnumpy\nload\n",
        b"cnumpy.f2py\nexec\n",
        b"cio\nopen\n",
    ]
    calls += [
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nbytearray\n",
        b"cnumpy\ndtype\n",
        b"c_codecs\nencode\n",
    ]
    calls += [
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy.core.numeric\n_frombuffer\n",
        b"cbuiltins\nset\n",
    ]
    calls += [b"cpathlib\nPosixPath\n", b"cbuiltins\ncomplex\n", b"cnumpy.core.multiarray\nscalar\n"]
    arguments = [
        b")",
        b"(S'touch MARK'\nt",
        b"(I1\nt",
        b"(N",
        b"(lp0\nt",
        b"(I99999999999\nt",
        b"(S'f8'\nI0\nI1\nt",
    ]
    others = [
        b"0",
        b"2",
        b"1",
        b"(",
        b"t",
        b"l",
        b"d",
        b"}",
        b"]",
        b")",
        b"a",
        b"e",
        b"s",
        b"u",
        b"b",
        b"R",
        b"\x81",
        b"Q",
    ]
    others += [
        b"\x92",
        b"\x93",
        b"\x94",
        b"\x97",
        b"\x98",
        b"\x82\x01",
        b"I-1\n",
        b"Fnan\n",
        b"L" + b"9" * 5000 + b"L\n",
    ]
    others += [
        b"\x8b\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
        b"\x95" + b"\xff" * 8,
        b"r\xff\xff\xff\xff",
        b"h\x00",
        b".",
    ]
    others += [
        b"X\x03\x00\x00\x00\xed\xa0\x80",
        b"(i__main__\nx\n",
        b"Pabc\n",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"}\x94]\x94",
    ]
    if rng.random() < 0.5:
        return pick(rng, calls) + pick(rng, arguments) + pick(rng, [b"R", b"\x81", b"R0", b""])
    return b"".join(pick(rng, others) for _ in range(int(rng.integers(1, 6))))
