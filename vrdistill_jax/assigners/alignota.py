"""AlignOTA: simOTA with a classification cost against the IoU as a soft label.

Source: Xu et al., "DAMO-YOLO: A Report on Real-Time Object Detection Design" (2022) and its repository, carried over to 3D
as in `assigners.ota`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vrdistill_jax.assigners import simota
from vrdistill_jax.assigners.assignment import Anchors, Assignment, Task
from vrdistill_jax.structs import Boxes


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners; entries as in `assigners.simota`.

    The classification cost is |y - p|^2 times the binary cross entropy against y, which is the IoU at the box's class and 0
    elsewhere, summed over classes.
    """
    return simota.default_config()


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns each box the anchors whose class scores agree best with their overlap.

    Args:
      anchors: of the batch, with predictions.
      boxes: ground truth.
      config: as `default_config`.
      task: whether boxes are turned.

    Returns:
      The assignment.

    Differs: pairs outside cost 1e3 more instead of 1e6, at which float32 could not rank them.
    """

    def class_cost(anchors: Anchors, boxes: Boxes, iou: Float[Array, "g a"]) -> Float[Array, "g a"]:
        probability = jax.nn.sigmoid(anchors.class_logits)
        entropy = optax.sigmoid_binary_cross_entropy(anchors.class_logits, jnp.zeros(()))
        elsewhere = jnp.square(probability) * entropy
        label = jnp.maximum(boxes.label, 0)
        own = optax.sigmoid_binary_cross_entropy(anchors.class_logits[:, label].T, iou)
        own = jnp.square(iou - probability[:, label].T) * own
        return jnp.sum(elsewhere, -1)[None] - elsewhere[:, label].T + own

    return simota.assign_by_cost(anchors, boxes, config, task, class_cost, 1e-7)
