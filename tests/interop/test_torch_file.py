"""The checkpoint reader: what it reads, and what it refuses to do."""

import argparse
import collections
import contextlib
import io
import lzma
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from oracles import torch_writer as writer

from vrdistill_jax.interop.inert_pickle import base_symbols, read_pickle
from vrdistill_jax.interop.torch_file import CheckpointFileError, UnsafeCheckpointError, read_torch_file

FORMATS = {
    "zip": writer.zip_bytes,
    "zip without byteorder": lambda obj: writer.zip_bytes(obj, order=None),
    "zip big endian": lambda obj: writer.zip_bytes(obj, order="big"),
    "zip protocol 4": lambda obj: writer.zip_bytes(obj, protocol=4),
    "zip protocol 5": lambda obj: writer.zip_bytes(obj, root="deep", protocol=5),
    "legacy": writer.legacy_bytes,
    "zip in xz": lambda obj: lzma.compress(writer.zip_bytes(obj)),
    "legacy in xz": lambda obj: lzma.compress(writer.legacy_bytes(obj)),
}


def read(tmp_path, data):
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    return read_torch_file(path)


@pytest.fixture(params=FORMATS)
def save_and_read(request, tmp_path):
    return lambda obj: read(tmp_path, FORMATS[request.param](obj))


def test_reads_containers_and_plain_values(save_and_read):
    args = argparse.Namespace(lr=0.1, names=["a", "b"], path=pathlib.PurePosixPath("/data/x"))
    obj = collections.OrderedDict(
        epoch=3, none=None, yes=True, big=2**90, text="ä", raw=b"\x00\xff", items=[1, (2.5, {"k":
        {1}})], args=args, steps=collections.Counter([1, 1]), array=bytearray(b"ab"), number=1 + 2j,
        frozen=frozenset(["x"]), factory=collections.defaultdict(list, a=[1]),
    )  # fmt: skip
    assert save_and_read(obj) == {
        "epoch": 3, "none": None, "yes": True, "big": 2**90, "text": "ä", "raw": b"\x00\xff",
        "items": [1, (2.5, {"k": {1}})], "args": {"lr": 0.1, "names": ["a", "b"], "path": "/data/x"},
        "steps": {1: 2}, "array": bytearray(b"ab"), "number": 1 + 2j, "frozen": frozenset(["x"]), "factory":
        {"a": [1]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "complex64"]
)
def test_reads_every_number_type(save_and_read, kind):
    array = np.arange(-3, 3).astype(kind).reshape(2, 3)
    got = save_and_read({"x": writer.tensor(array)})["x"]
    assert got.dtype == array.dtype
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, array)


def test_bfloat16_becomes_float32(save_and_read):
    bits = np.array([0x3F80, 0xC000, 0x4049, 0x7F80], np.uint16)  # 1, -2, 3.140625, infinity
    got = save_and_read([writer.tensor(bits, "bfloat16")])[0]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [1.0, -2.0, 3.140625, np.inf])


def test_reads_booleans_scalars_and_empty_tensors(save_and_read):
    obj = {
        "mask": writer.tensor(np.array([True, False, True])),
        "count": writer.tensor(np.array(7)),
        "none": writer.Tensor(writer.Storage(np.zeros(0, np.float32)), (0, 4)),
    }
    got = save_and_read(obj)
    assert got["mask"].tolist() == [True, False, True]
    assert got["count"].shape == ()
    assert got["count"] == 7
    assert got["none"].shape == (0, 4)


def test_strided_tensors_are_views_of_one_storage(save_and_read):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    storage = writer.Storage(base)
    got = save_and_read(
        {
            "all": writer.Tensor(storage, (4, 6)),
            "transposed": writer.Tensor(storage, (6, 4), (1, 6)),
            "window": writer.Tensor(storage, (2, 3), (12, 2), offset=7),
            "expanded": writer.Tensor(storage, (3, 2), (0, 1), offset=4),
        }
    )
    np.testing.assert_array_equal(got["all"], base)
    np.testing.assert_array_equal(got["transposed"], base.T)
    np.testing.assert_array_equal(got["window"], base[1::2, 1::2][:, :3])
    np.testing.assert_array_equal(got["expanded"], [[4, 5]] * 3)
    assert np.shares_memory(got["all"], got["transposed"])
    with pytest.raises(ValueError, match="read-only"):
        got["all"][0] = 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3,
    dtype=">f4"),
              np.array([True, False]), np.float64(2.5), np.array(3, np.int16), np.zeros((0, 2), np.float32)]
)  # fmt: skip
def test_reads_numpy_arrays(tmp_path, array, protocol):
    got = read(tmp_path, writer.zip_bytes([array, array], protocol=protocol))
    np.testing.assert_array_equal(got[0], array)
    assert got[0].dtype.newbyteorder("=") == np.asarray(array).dtype.newbyteorder("=")
    assert got[0] is got[1]


# ---- Refusals: nothing may run, whatever the pickle says ----


def malicious(marker):
    text = f"S'touch {marker}'\n"
    write = f"S'open(\"{marker}\", chr(119)).close()'\n"
    return {
        "os.system": "cos\nsystem\n(" + text + "tR.",
        "posix.system": "cposix\nsystem\n(" + text + "tR.",
        "subprocess": "csubprocess\nPopen\n((lp0\n" + text + "atR.",
        "eval": "c__builtin__\neval\n(" + write + "tR.",
        "exec, protocol 4": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x01x\x85R.",
        "import": "c__builtin__\n__import__\n(S'os'\ntR.",
        "getattr of an allowed name": "c__builtin__\ngetattr\n(ccollections\nOrderedDict\nS'__init__'\ntR.",
        "attribute path": b"\x80\x04\x8c\x0bcollections\x8c\x1dOrderedDict.__init__.__call__\x93.",
        "module attribute": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        "nested pickle": "ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        "instance": "(" + text + "ios\nsystem\n.",
        "object": "(cos\nsystem\n" + text + "o.",
        "extension": b"\x82\x01.",
        "keywords": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
        "buffer": b"\x80\x05\x97.",
        "other codec": "c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
        "object array": "cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        "subarray type": "cnumpy\ndtype\n(S'(1000000,)f8'\nI0\nI1\ntR.",
        "array subclass": "cnumpy.core.multiarray\n_reconstruct\n(ccollections\nOrderedDict\n(I0\ntS'b'\ntR.",
        "whole model": "cmodels.votenet\nVoteNet\n)\x81}b.",
        "call of a type": "c__builtin__\nint\n(S'1'\ntR.",
        "call of a value": "(lp0\n(tR.",
        "state on a function": "c_codecs\nencode\n}S'__defaults__'\n(I1\ntsb.",
        "state on a list": "(lp0\n}b.",
        "persistent module": "(S'module'\nI1\nI2\nI3\ntQ.",
    }  # fmt: skip


@pytest.mark.parametrize("name", malicious("x"))
@pytest.mark.parametrize("legacy", [False, True])
def test_refuses_to_run_anything(tmp_path, name, legacy):
    marker = tmp_path / "ran"
    program = malicious(marker)[name]
    program = program if isinstance(program, bytes) else program.encode("latin-1")
    if legacy:
        data = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + program
    else:
        data = writer.zip_of(program)
    with pytest.raises(UnsafeCheckpointError, match="state_dict"):
        read(tmp_path, data)
    assert not marker.exists()


def test_the_first_pickles_of_a_legacy_file_are_inert_too(tmp_path):
    with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
        read(tmp_path, b"cos\nsystem\n(S'true'\ntR.")


def test_refusal_names_the_class(tmp_path):
    with pytest.raises(
        UnsafeCheckpointError, match=r"models\.votenet\.VoteNet.*torch\.save\(model\.state_dict\(\)"
    ):
        read(tmp_path, writer.zip_of(b"cmodels.votenet\nVoteNet\n)\x81."))


def test_state_of_an_ordered_dict_is_not_kept(tmp_path):
    program = b"ccollections\nOrderedDict\n)R(S'a'\nI1\nu}S'_metadata'\nI5\nsb."
    assert read(tmp_path, writer.zip_of(program)) == {"a": 1}


# ---- Damage and bombs ----


def rebuild(numel, offset, shape, stride, metadata=b""):
    """data.pkl of one float tensor with any claims."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{numel}\ntQ"
    sizes = "(" + "".join(f"I{n}\n" for n in shape) + "t"
    strides = "(" + "".join(f"I{n}\n" for n in stride) + "t"
    arguments = f"({storage}I{offset}\n{sizes}{strides}I00\nN".encode() + metadata + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_the_hand_written_tensor_is_read(tmp_path):
    data = writer.zip_of(rebuild(6, 1, (2, 2), (2, 1)), {"data/0": np.arange(6, dtype="<f4").tobytes()})
    np.testing.assert_array_equal(read(tmp_path, data), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride", "message"),
    [
        (6, 0, (7,), (1,), "reaches element 6"),
        (6, 3, (2, 2), (2, 1), "reaches element 6"),
        (6, 0, (2,), (1 << 40,), "reaches element"),
        (6, 0, (1 << 40,), (0,), "repeats"),
        (6, 0, (1 << 20, 1 << 20), (0, 0), "repeats"),
        (6, 0, (1 << 62, 4), (0, 0), "absurd"),
        (6, 0, (-1,), (1,), "negative"),
        (6, 0, (2,), (-1,), "negative"),
        (6, -1, (2,), (1,), "negative offset"),
        (6, 0, (2, 2), (1,), "2 sizes and 1 strides"),
        (7, 0, (2,), (1,), "24 bytes instead of 28"),
        (1 << 60, 0, (2,), (1,), "24 bytes instead of"),
        (6, 0, (1,) * 40, (1,) * 40, "at most 32"),
    ],
)
def test_impossible_tensors_are_refused_before_they_are_built(
    tmp_path, numel, offset, shape, stride, message
):
    data = writer.zip_of(rebuild(numel, offset, shape, stride), {"data/0": bytes(24)})
    with pytest.raises(CheckpointFileError, match=message):
        read(tmp_path, data)


def test_lazy_conjugates_are_refused(tmp_path):
    program = rebuild(6, 0, (2,), (1,), metadata=b"}S'conj'\nI01\ns")
    with pytest.raises(CheckpointFileError, match="conjugate"):
        read(tmp_path, writer.zip_of(program, {"data/0": bytes(24)}))


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bombs():
    copies = (
        b"("
        + b"I1\n" * 20000
        + b"lq\x00"
        + b"0"
        + b"".join(b"c__builtin__\nset\n(h\x00tR" for _ in range(3000))
        + b"."
    )
    texts = (
        b"X"
        + struct.pack("<I", 1 << 20)
        + b"a" * (1 << 20)
        + b"q\x00"
        + b"c_codecs\nencode\n(h\x00tR" * 3000
        + b"."
    )
    return {
        "copied sets": writer.zip_of(copies),
        "copied texts": writer.zip_of(texts),
        "huge memo row": writer.zip_of(b"I1\nr\xff\xff\xff\xff."),
        "huge text": writer.zip_of(b"\x8d" + struct.pack("<Q", 1 << 62) + b"a."),
        "huge integer": writer.zip_of(b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"a."),
        "huge bytes": writer.zip_of(b"\x8e" + struct.pack("<Q", 1 << 40) + b"a."),
        "compressed": writer.zip_of(b"N" + b"0N" * (1 << 22) + b".", compression=zipfile.ZIP_DEFLATED),
    }


@pytest.mark.parametrize("name", [n for n in bombs() if n != "huge memo row"])
def test_bombs_are_refused_within_bounded_memory(tmp_path, name):
    data = bombs()[name]
    path = tmp_path / "bomb.pth"
    path.write_bytes(data)

    def read_bomb():
        with pytest.raises(CheckpointFileError):
            read_torch_file(path)

    assert peak_memory(read_bomb) < (300 << 20)


def test_a_huge_memo_row_costs_nothing(tmp_path):
    data = bombs()["huge memo row"]
    assert peak_memory(lambda: read(tmp_path, data)) < (1 << 20)


def test_an_xz_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vrdistill_jax.interop.torch_file.MAX_DECOMPRESSED_BYTES", 1 << 22)
    data = lzma.compress(bytes(1 << 26))
    path = tmp_path / "bomb.pth.xz"
    path.write_bytes(data)

    def read_bomb():
        with pytest.raises(CheckpointFileError, match="unpacks to more"):
            read_torch_file(path)

    assert peak_memory(read_bomb) < (64 << 20)


def test_deep_nesting_neither_recurses_nor_takes_exponential_time(tmp_path):
    deep = read(tmp_path, writer.zip_of(b"N" + b"\x85" * 100_000 + b"."))
    assert isinstance(deep, tuple)
    doubling = b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 200
    assert len(read(tmp_path, writer.zip_of(doubling + b"."))) == 2
    with pytest.raises(CheckpointFileError, match="as a key"):  # hashing it would take 2^200 steps
        read(tmp_path, writer.zip_of(doubling + b"q\x01}h\x01Ns."))


def test_entries_that_lie_on_each_other_are_refused(tmp_path):
    data = bytearray(writer.zip_of(b"N.", {f"data/{n}": bytes(1000) for n in range(8)}))
    end = data.rfind(b"PK\x05\x06")
    at = struct.unpack("<I", data[end + 16 : end + 20])[0]
    while data[at : at + 4] == b"PK\x01\x02":  # every entry claims 4000 bytes
        data[at + 20 : at + 28] = struct.pack("<II", 4000, 4000)
        at += 46 + sum(struct.unpack("<HHH", data[at + 28 : at + 34]))
    with pytest.raises(CheckpointFileError, match="claim more bytes"):
        read(tmp_path, bytes(data))


def npz():
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, world", "no PyTorch checkpoint"),
        (bytes(600), "no PyTorch checkpoint"),
        (bytes(257) + b"ustar" + bytes(300), "too old"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
        (npz(), "one data.pkl"),
        (pickle.dumps({"a": 1}), "no PyTorch checkpoint"),
        (writer.zip_of(b"N.", {"constants.pkl": b"N."}), "TorchScript"),
        (writer.zip_of(b"N.", order="middle"), "byteorder"),
        (writer.zip_of(rebuild(6, 0, (2,), (1,))), "lacks the entry"),
        (writer.zip_of(b"N"), "damaged or incomplete"),
        (lzma.compress(writer.zip_of(b"N."))[:-20], "xz compression"),
    ],
)
def test_other_files_are_named(tmp_path, data, message):
    with pytest.raises(CheckpointFileError, match=message):
        read(tmp_path, data)


def checkpoint():
    rng = np.random.default_rng(0)
    return {
        "model": collections.OrderedDict(
            (f"w{n}", writer.tensor(rng.normal(size=(3, 2)).astype("f4"))) for n in range(3)
        ),
        "args": argparse.Namespace(a=1),
        "array": np.arange(3.0),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "zip in xz"])
def test_every_truncation_is_an_error(tmp_path, form):
    data = FORMATS[form](checkpoint())
    for end in range(0, len(data), 7):
        with pytest.raises((CheckpointFileError, UnsafeCheckpointError)):
            read(tmp_path, data[:end])


@pytest.mark.parametrize("form", ["data.pkl", "zip", "legacy"])
def test_random_damage_raises_our_errors_only(tmp_path, form):
    rng = np.random.default_rng(1)
    program, storages = writer.pickle_of(checkpoint())
    entries = {f"data/{key}": s.raw.tobytes() for key, s in storages.items()}
    original = program if form == "data.pkl" else FORMATS[form](checkpoint())
    refused = 0
    for _ in range(600):
        data = bytearray(original)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        try:
            read(tmp_path, writer.zip_of(bytes(data), entries) if form == "data.pkl" else bytes(data))
        except (CheckpointFileError, UnsafeCheckpointError):
            refused += 1
    assert refused > 100


def test_random_opcodes_raise_our_errors_only():
    rng = np.random.default_rng(2)
    names = [f"c{module}\n{name}\n".encode() for module, name in base_symbols()]
    codes = [bytes([b]) for b in b"(.012NKMIJ\x88\x89]})lutad\x85\x86\x87seRb\x81\x90\x8f\x91q\x00h\x00Q"]
    pieces = names + codes * 6 + [b"K\x01", b"X\x01\x00\x00\x00a", b"C\x02ab", b"h\x00", b"q\x00"] * 10
    for _ in range(3000):
        program = b"".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(1, 40))) + b"."
        with contextlib.suppress(CheckpointFileError, UnsafeCheckpointError):
            read_pickle(io.BytesIO(program), base_symbols())


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "container", "tensors", "values"),
    [
        ("votenet_sunrgbd/weights.pth", "model_state_dict", 146, 959_465),
        ("3detr_sunrgbd/weights.pth.xz", "model", 293, 7_317_241),
        ("groupfree_sunrgbd/weights.pth.xz", "model", 622, 15_416_344),
        ("h3dnet_scannet/weights.pth.xz", "model_state_dict", 730, 4_776_486),
    ],
)
def test_reads_the_golden_checkpoints(shared, file, container, tensors, values):
    state = read_torch_file(shared / "golden" / file)[container]
    assert len(state) == tensors
    assert sum(x.size for x in state.values()) == values
    assert all(np.isfinite(x).all() for x in state.values())
