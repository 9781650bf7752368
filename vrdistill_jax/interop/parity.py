"""A table that compares our numbers with another project's, tensor by tensor."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One compared tensor."""

    name: str
    shape: tuple[int, ...]
    error: float  # largest error relative to the largest magnitude; number of mismatches for exact rows
    tolerance: float  # 0 for exact rows
    note: str  # why it failed, "" if it did not


class ParityTable:
    """Collects comparisons; nothing is raised, so that one table shows all differences."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []  # what the reference offers no numbers for

    def add(
        self, name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float, scale: float | None = None
    ) -> bool:
        """Compares floats.

        Args:
          name: of the tensor.
          ours: any shape.
          theirs: the same shape.
          tolerance: largest |ours - theirs| allowed, relative to `scale`.
          scale: None for the largest |theirs| (1 where they are all 0).

        Returns:
          Whether it passed.
        """
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            return self._append(name, ours.shape, np.inf, tolerance, f"expected shape {theirs.shape}")
        if not np.isfinite(theirs).all():
            return self._append(name, ours.shape, np.inf, tolerance, "the reference holds NaN or infinity")
        if not np.isfinite(ours).all():
            return self._append(name, ours.shape, np.inf, tolerance, "NaN or infinity")
        error = float(np.max(np.abs(ours - theirs), initial=0.0)) / (scale or _magnitude(theirs))
        return self._append(name, ours.shape, error, tolerance, "" if error <= tolerance else "too far off")

    def add_exact(self, name: str, ours: np.ndarray, theirs: np.ndarray, allowed: int = 0) -> bool:
        """Compares integers or masks.

        Args:
          name: of the tensor.
          ours: integers or booleans, any shape.
          theirs: the same shape; 0/1 integers may stand for booleans.
          allowed: mismatching entries that are accepted; say why where it is not 0.

        Returns:
          Whether it passed.
        """
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            return self._append(name, ours.shape, np.inf, allowed, f"expected shape {theirs.shape}")
        mismatches = int(np.sum(ours.astype(np.int64) != theirs.astype(np.int64)))
        return self._append(
            name, ours.shape, mismatches, allowed, "" if mismatches <= allowed else "entries differ"
        )

    def add_stored(
        self,
        golden: Mapping[str, np.ndarray],
        name: str,
        ours: np.ndarray,
        tolerance: float,
        channels_first: bool = False,
        label: str | None = None,
    ) -> bool:
        """Compares floats with an array of a golden file, whole or strided.

        A large array is stored as NAME__slice (flat[start::step]), NAME__slice_start_step, NAME__shape,
        NAME__sum64 and NAME__abssum64: shape, slice and both sums are compared. An error of e in every
        element may move a sum by e times the number of elements, which is what the sums are allowed.

        Args:
          golden: the arrays of the file.
          name: of the array in it.
          ours: our array, channels last.
          tolerance: as in `add`.
          channels_first: whether theirs is [B, C, N] where ours is [B, N, C].
          label: how the row is called, if not as the array.

        Returns:
          Whether it passed.
        """
        label = label or name
        ours = np.asarray(ours)
        if channels_first:
            ours = np.moveaxis(ours, -1, 1)
        if name in golden:
            return self.add(label, ours, golden[name], tolerance)
        missing = [name + s for s in ("__slice", "__slice_start_step", "__shape") if name + s not in golden]
        if missing:
            return self._append(label, ours.shape, np.inf, tolerance, f"the golden file lacks {missing[0]}")
        shape = tuple(int(n) for n in golden[f"{name}__shape"])
        if ours.shape != shape:
            return self._append(label, ours.shape, np.inf, tolerance, f"expected shape {shape}")
        start, step = (int(n) for n in golden[f"{name}__slice_start_step"])
        part = golden[f"{name}__slice"]
        passed = self.add(label, ours.reshape(-1)[start::step], part, tolerance)
        self.rows[-1] = self.rows[-1]._replace(shape=shape)
        flat, slack = ours.reshape(-1).astype(np.float64), tolerance * _magnitude(part) * ours.size
        for suffix, total in (("__sum64", flat.sum()), ("__abssum64", np.abs(flat).sum())):
            if name + suffix in golden:
                off = abs(total - float(golden[name + suffix]))
                if not off <= slack:
                    self.rows[-1] = self.rows[-1]._replace(
                        error=max(self.rows[-1].error, off), note=f"{suffix[2:]} off"
                    )
                    passed = False
        return passed

    @property
    def failed(self) -> list[str]:
        """Names of the rows that failed."""
        return [row.name for row in self.rows if row.note]

    @property
    def ok(self) -> bool:
        """Whether anything was compared and everything passed."""
        return bool(self.rows) and not self.failed

    def render(self) -> str:
        """One line per tensor, then the verdict."""
        width = max((len(row.name) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            verdict = f"FAILED ({row.note})" if row.note else "ok"
            lines.append(
                f"{row.name:<{width}}  {shape:<14}  {row.error:9.2e}  <= {row.tolerance:7.1e}  {verdict}"
            )
        lines += [f"skipped: {what}" for what in self.skipped]
        if not self.rows:
            lines.append("parity: FAILED at nothing to compare")
        else:
            lines.append(f"parity: FAILED at {self.failed[0]}" if self.failed else "parity: OK")
        return "\n".join(lines)

    def _append(self, name: str, shape: tuple[int, ...], error: float, tolerance: float, note: str) -> bool:
        self.rows.append(Row(name, tuple(shape), float(error), float(tolerance), note))
        return not note


def _magnitude(values: np.ndarray) -> float:
    """The largest absolute value, 1 where all are 0."""
    return float(np.max(np.abs(values), initial=0.0)) or 1.0


def has_file(table: ParityTable, path: pathlib.Path) -> bool:
    """Whether the reference offers a file; if not, the table says so."""
    if not path.is_file():
        table.skipped.append(f"no {path.name} there")
    return path.is_file()


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)


def list_arrays(path: pathlib.Path) -> list[str]:
    """The names of the arrays of an .npz file; none is read."""
    with np.load(path) as file:
        return file.files
