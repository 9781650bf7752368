"""Checkpoints of PyTorch and Keras."""

import lzma
import struct
import zipfile
import zlib

import numpy as np
from fuzz import file_mutations
from fuzz.hdf5_bombs import HDF5_BOMBS
from fuzz.samples import MIB, Reader, folder_files, helpers
from oracles import torch_writer


def checkpoints() -> dict[str, Reader]:
    maker = helpers("interop/test_torch_file.py")
    obj = maker.checkpoint()

    def read(folder):
        from vrdistill_jax.interop.torch_file import read_torch_file

        return read_torch_file(folder / "file.pth")

    def state(folder):
        from vrdistill_jax.interop.name_map import find_state_dict
        from vrdistill_jax.interop.torch_file import read_torch_file

        return find_state_dict(read_torch_file(folder / "file.pth"), ("model_state_dict", "model"))

    bombs = maker.bombs()
    bombs |= {f"! malicious: {name}": _archive(program) for name, program in maker.malicious("MARK").items()}
    bombs |= checkpoint_bombs(maker)
    hostile = {name: {"file.pth": data} for name, data in bombs.items()}

    def network(folder):
        from vrdistill_jax.interop.torch_file import read_torch_file
        from vrdistill_jax.interop.torch_votenet import variables_from_votenet

        return variables_from_votenet(read_torch_file(folder / "file.pth"), "sunrgbd")[0]

    def reader(data, **options):
        return Reader({"file.pth": data}, read, memory=300 * MIB, **options)

    arrays = helpers("interop/test_torch_votenet.py").official_state(width=1 / 32)
    tensors = {name: torch_writer.tensor(array) for name, array in arrays.items()}
    one = torch_writer.Storage(np.ones(1, np.float32))
    repeated = {name: torch_writer.Tensor(one, (1 << 12, 1 << 12), (0, 0)) for name in tensors}
    floods = {
        "! each tensor repeats one number": {"file.pth": torch_writer.zip_bytes(repeated)},
        "! escapes in a name": {
            "file.pth": torch_writer.zip_bytes({**tensors, "\x1b[31m": tensors["vgen.bn1.bias"]})
        },
        "! a long name": {"file.pth": torch_writer.zip_bytes({"x" * 100_000: 1})},
        "! missing": {"file.pth": None},
        "! escapes in a key": {"file.pth": torch_writer.zip_bytes({"\x1b[31m\ud800": 1})},
    }

    big = torch_writer.zip_bytes(obj, order="big", protocol=4)
    return {
        "torch_zip": reader(torch_writer.zip_bytes(obj), hostile=hostile),
        "torch_zip_big": reader(big),
        "torch_legacy": reader(torch_writer.legacy_bytes(obj)),
        "torch_xz": reader(lzma.compress(torch_writer.zip_bytes(obj))),
        "torch_votenet": Reader(
            {"file.pth": torch_writer.zip_bytes(tensors)},
            network,
            hostile=floods,
            names_file=False,
            memory=300 * MIB,
        ),
        "torch_state": Reader(
            {"file.pth": torch_writer.zip_bytes(obj)}, state, names_file=False, memory=300 * MIB
        ),
    }


def _archive(program) -> bytes:
    return torch_writer.zip_of(program if isinstance(program, bytes) else program.encode("latin-1"))


def checkpoint_bombs(maker) -> dict[str, bytes]:
    megabyte = bytes(MIB)
    untyped = b"(S'storage'\nctorch\nUntypedStorage\nS'0'\nS'cpu'\nI1048576\ntQq\x000"
    call = b"ctorch._utils\n_rebuild_tensor_v3\n(h\x00I0\n(I1\nt(I1\ntI00\nNctorch\nfloat64\ntR"
    empties = b"(" + b"X\x00\x00\x00\x00" + b"2" * 60_000 + b"tq\x010"
    wide_key = b"\x8b" + struct.pack("<i", MIB) + b"\x7f" * MIB + b"q\x000}q\x01"
    return {
        "a storage decoded 2000 times": torch_writer.zip_of(
            b"(" + untyped + call * 2000 + b"l.", {"data/0": megabyte}
        ),
        "a path of 60,000 parts 4000 times": _archive(
            empties + b"(" + b"cpathlib\nPosixPath\nh\x01R0" * 4000 + b"l."
        ),
        "a wide integer hashed 20,000 times": _archive(wide_key + b"h\x01h\x00Ns0" * 20_000 + b"h\x01."),
        "! xz bomb": lzma.compress(torch_writer.zip_of(b"N.", {"data/0": bytes(64 * MIB)}), preset=0),
        "xz dictionary of 1 GB": _xz_with_large_dictionary(),
        "! zip bomb": file_mutations.write_zip([("a/data.pkl", bytes(64 * MIB))], zipfile.ZIP_DEFLATED),
        "upward names": file_mutations.write_zip([("../../data.pkl", b"N."), ("../../data/0", b"x")]),
        "! other name in the entry": torch_writer.zip_bytes({"a": "x" * 5000}).replace(
            b"archive/data", b"\x1brchive/data", 1
        ),
        "! text of no characters": _archive(
            b"cnumpy.core.numeric\n_frombuffer\n(C\x04\xff\xff\xff\x7fcnumpy\ndtype\n(S'U1'\nI0\nI1\ntR(I1\ntS'C'\ntR."
        ),
        "escapes in a class": _archive(b"c\x1b[31mmodels\nVote\x07Net\n)\x81."),
        "a storage called ../x": torch_writer.zip_of(
            maker.rebuild(6, 0, (2,), (1,)).replace(b"S'0'", b"S'../../x'"), {"data/0": bytes(24)}
        ),
        "an escape as a storage": torch_writer.zip_of(
            maker.rebuild(6, 0, (2,), (1,)).replace(b"S'0'", b"S'\\x1b[31m'"), {"data/0": bytes(24)}
        ),
    }


def _xz_with_large_dictionary() -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(torch_writer.zip_of(b"N."), filters=filters))
    at = data.index(b"\x21\x01") + 2  # the dictionary's size of the LZMA2 filter
    data[at] = 36  # 1 GiB
    head = data[12:]
    size = (head[0] + 1) * 4
    data[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(bytes(head[: size - 4])))
    return bytes(data)


def keras() -> dict[str, Reader]:
    import h5py

    maker = helpers("interop/test_keras_votenet.py")
    data = folder_files(lambda root: maker.write(root / "w.h5"))

    def small(root):
        with h5py.File(root / "w.h5", "w") as file:
            for n in range(3):
                file[f"conv2d_{n}/conv2d_{n}/kernel:0"] = np.ones((1, 1, 4, 5), np.float32)
                file.create_dataset(
                    f"bn_{n}/bn_{n}/gamma:0", data=np.ones(50, np.float32), compression="gzip"
                )
            file.attrs["layer_names"] = [b"conv2d_0", b"bn_0"]

    def hdf5(change):
        def make(root):
            with h5py.File(root / "w.h5", "w") as file:
                change(file)

        return folder_files(make)

    def read(folder):
        from vrdistill_jax.interop.keras_votenet import read_keras_file

        return read_keras_file(folder / "w.h5")

    def variables(folder):
        from vrdistill_jax.interop.keras_votenet import variables_from_keras

        return variables_from_keras(folder / "w.h5")[0]

    hostile = {name: hdf5(change) for name, change in HDF5_BOMBS.items()}
    tree = folder_files(small)["w.h5"]
    hostile |= {
        f"! damaged {word.decode()}": {"w.h5": tree.replace(word, b"\0\0\0\0")} for word in (b"TREE", b"HEAP")
    }
    hostile["doubling references"] = hostile.pop("! doubling references")  # which Keras files do not follow
    return {
        "keras_h5": Reader(folder_files(small), read, hostile=hostile),
        "keras_votenet": Reader(data, variables, names_file=False),
    }
