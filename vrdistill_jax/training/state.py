"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vrdistill_jax.structs import AnyPyramid, Array, NetworkInput, Points, Scene


class Batch(NamedTuple):
    """What the loader delivers: scenes and the geometry that the trained network reads."""

    scene: Scene
    pyramid: AnyPyramid
    teacher: NetworkInput | None = None  # what a teacher reads; None where that is the same

    @property
    def teacher_input(self) -> NetworkInput:
        """What the teacher reads."""
        return self.teacher or NetworkInput(self.scene.points, self.pyramid)


class DistillerState(NamedTuple):
    """The learnable parts of the distillers, which inference does without, and their own optimiser's state."""

    params: dict  # by name of the method
    opt_state: Any


class TrainState(NamedTuple):
    """Everything that a checkpoint of a run holds besides its config."""

    step: Array  # i32[], steps done
    params: dict
    batch_stats: dict
    opt_state: Any
    distiller: DistillerState | None = None  # None without distillation

    @property
    def variables(self) -> dict:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_variables(model: nn.Module, key: Array, points: Points, pyramid: AnyPyramid) -> dict:
    """Initial parameters and running statistics; only the shapes of `points` and `pyramid` matter."""
    return jax.jit(lambda k: model.init(k, points, pyramid, train=False))(key)


def init_state(variables: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before the first step."""
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params)
    )


def count_parameters(params: dict) -> int:
    """Number of trainable scalars."""
    return sum(x.size for x in jax.tree.leaves(params))
