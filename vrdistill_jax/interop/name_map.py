"""Moves tensors from another project's names into our tree of variables and accounts for every one."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.point_tables import printable

MAX_VALUES = 1 << 27  # of a network; these detectors have at most some 2^24
# Names of the input features by their number of channels.
INPUT_FEATURES: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("height",),
    3: ("color",),
    4: ("color", "height"),
}
Tensors = Mapping[str, np.ndarray]
Variables = dict[str, Any]


class Rule(NamedTuple):
    """Where one tensor of theirs goes."""

    theirs: str  # its name in their state_dict
    ours: str  # path in our variables, for example "params/backbone/sa1/mlp/layer0/dense/kernel"
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


def kernel_from_conv(weight: np.ndarray) -> np.ndarray:
    """Turns the weight [out, in] or [out, in, 1, ...] of a 1x1 convolution into a Dense kernel [in, out].

    Raises:
      ValueError: if the convolution is wider than one point.
    """
    if weight.ndim < 2 or any(n != 1 for n in weight.shape[2:]):
        raise ValueError(
            f"expected the weight of a 1x1 convolution [out, in, 1, ...], got shape {weight.shape}"
        )
    return weight.reshape(weight.shape[:2]).T


def dense_rules(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """A 1x1 convolution or linear layer."""
    rules = [Rule(f"{theirs}.weight", f"params/{ours}/kernel", kernel_from_conv)]
    return rules + ([Rule(f"{theirs}.bias", f"params/{ours}/bias")] if bias else [])


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """A batch norm: affine parameters and running statistics."""
    return [
        Rule(f"{theirs}.weight", f"params/{ours}/scale"),
        Rule(f"{theirs}.bias", f"params/{ours}/bias"),
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    ]


def mlp_rules(theirs: str, ours: str, count: int, conv: str, norm: str, bias: bool = False) -> list[Rule]:
    """A PointMLP of `count` layers; `theirs`, `conv` and `norm` are names with {} for the layer's number."""
    rules = []
    for n in range(count):
        layer = f"{ours}/layer{n}"
        rules += dense_rules(
            f"{theirs}.{conv.format(n)}" if theirs else conv.format(n), f"{layer}/dense", bias
        )
        rules += norm_rules(f"{theirs}.{norm.format(n)}" if theirs else norm.format(n), f"{layer}/norm")
    return rules


def map_tensors(tensors: Tensors, rules: Iterable[Rule]) -> Variables:
    """Applies the rules; only batch norms' num_batches_tracked counters may be left over.

    Args:
      tensors: their state_dict, without a common prefix.
      rules: one per tensor of theirs.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 arrays.

    Raises:
      ValueError: listing the tensors that are missing and those that no rule takes.
    """
    rules = list(rules)
    taken = {rule.theirs for rule in rules}
    missing = sorted(taken - set(tensors))
    left = sorted(n for n in set(tensors) - taken if not n.endswith("num_batches_tracked"))
    if missing or left:
        raise ValueError(
            f"the checkpoint's tensors do not fit: {len(missing)} missing ({_few(missing)}), "
            f"{len(left)} unknown "
            f"({_few(left)}); check --detector and that the checkpoint is of an unmodified model"
        )
    count = sum(np.size(tensors[name]) for name in taken)
    if count > MAX_VALUES:  # a small file can hold large tensors that repeat one number
        raise ValueError(f"the checkpoint's tensors hold {count} numbers, more than {MAX_VALUES}")
    variables: Variables = {"params": {}, "batch_stats": {}}
    for rule in rules:
        try:
            value = np.array(rule.convert(_numbers(tensors[rule.theirs])), np.float32)
        except ValueError as error:
            raise ValueError(f"{rule.theirs}: {error}") from error
        if not np.isfinite(value).all():
            raise ValueError(
                f"{rule.theirs} holds NaN or infinity; use a checkpoint from before the training diverged"
            )
        *folders, leaf = rule.ours.split("/")
        node = variables
        for folder in folders:
            node = node.setdefault(folder, {})
        if leaf in node:
            raise ValueError(f"two rules write {rule.ours}")
        node[leaf] = value
    return variables


def check_shapes(variables: Variables, expected: Variables) -> None:
    """Compares a mapped tree with the tree of shapes that the network expects.

    Args:
      variables: nested dictionaries of arrays.
      expected: nested dictionaries of arrays or jax.ShapeDtypeStruct.

    Raises:
      ValueError: listing the paths that differ, ours and theirs.
    """
    got, want = flatten(variables), flatten(expected)
    wrong = [f"{path} is absent from the checkpoint" for path in want if path not in got]
    wrong += [f"{path} is unknown to the network" for path in got if path not in want]
    wrong += [
        f"{path} has shape {tuple(got[path].shape)}, the config needs {tuple(want[path].shape)}"
        for path in want
        if path in got and tuple(got[path].shape) != tuple(want[path].shape)
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the network in {len(wrong)} tensors: {_few(wrong, '; ')}"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat


def find_state_dict(checkpoint: Any, containers: Iterable[str]) -> dict[str, np.ndarray]:
    """Finds the state_dict in a loaded checkpoint and strips the "module." of data-parallel training.

    Args:
      checkpoint: what read_torch_file returned.
      containers: keys under which the project's training script keeps it; a bare state_dict is accepted too.

    Returns:
      {name: array}.

    Raises:
      ValueError: if there is none.
    """
    containers = tuple(containers)
    candidates = [checkpoint]
    if isinstance(checkpoint, Mapping):
        candidates = [checkpoint[key] for key in containers if key in checkpoint] or [checkpoint]
    state = candidates[0]
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(v, np.ndarray) for v in state.values())
    ):
        found = (
            ", ".join(printable(str(key), 60) for key in list(checkpoint)[:8])
            if isinstance(checkpoint, Mapping)
            else type(checkpoint).__name__
        )
        raise ValueError(
            f"the checkpoint holds no state_dict under {' or '.join(containers)} and is none itself; it "
            f"holds: {found}"
        )
    names = [str(name) for name in state]
    if all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, state.values(), strict=True))


def _numbers(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ValueError(f"expected a tensor of numbers, got {getattr(value, 'dtype', type(value).__name__)}")
    return value


def _few(names: list[str], separator: str = ", ") -> str:
    shown = separator.join(printable(name, 200) for name in names[:6]) or "none"
    return shown + (f"{separator}and {len(names) - 6} more" if len(names) > 6 else "")


def read_number(options: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number among the options that a checkpoint was trained with; `default` where it is not among them.

    Raises:
      ValueError: if it is no finite number within [low, high].
    """
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the checkpoint's option {name} is no finite number")
    if not low <= value <= high:
        raise ValueError(f"the checkpoint's option {name} is {value}; expected {low} to {high}")
    return value
