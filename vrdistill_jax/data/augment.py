"""Random changes of a scene that keep its labels true.

A scene here is the sample dict that sources give: xyz f32[n, 3], color f32[n, 3], instance i32[n], boxes_center f32[g, 3],
boxes_size f32[g, 3], boxes_yaw f32[g], boxes_label i32[g]. Each function returns a new dict and the 4x4 matrix that maps the
old coordinates to the new ones.
"""

from typing import Any

import numpy as np


def augment(sample: dict, config: Any, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Flips, turns and scales a scene as the config says.

    Args:
      sample: a scene.
      config: `flip_x`, `flip_y` (probabilities of mirroring that axis), `max_turn` (radians; uniform in +-), `max_scale` (0.15
        for a factor uniform in [0.85, 1.15]), `refit_boxes` (True where boxes are axis-aligned: a turned box becomes its
        axis-aligned bounds, so sizes grow; False where they carry a yaw).
      rng: source of randomness; the same number of draws is made whatever the config.

    Returns:
      (new sample, f64[4, 4]).

    Source: VoteNet, scannet_detection_dataset.py and sunrgbd_detection_dataset.py.
    """
    flip_x, flip_y, turn, stretch = rng.random(4)
    matrix = np.eye(4)
    if flip_x < config.flip_x:
        matrix = np.diag([-1.0, 1.0, 1.0, 1.0]) @ matrix
    if flip_y < config.flip_y:
        matrix = np.diag([1.0, -1.0, 1.0, 1.0]) @ matrix
    angle = (2 * turn - 1) * config.max_turn
    scale = 1.0 + (2 * stretch - 1) * config.max_scale
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.diag([scale, scale, scale, 1.0]) @ rotation @ matrix
    return transform_sample(sample, matrix, config.refit_boxes), matrix


def transform_sample(sample: dict, matrix: np.ndarray, refit_boxes: bool) -> dict:
    """Applies mirroring, a turn about z and a uniform scale to points and boxes.

    Args:
      sample: a scene.
      matrix: f64[4, 4] made of those three only.
      refit_boxes: True keeps boxes axis-aligned (yaw 0), replacing a turned box by its bounds.

    Returns:
      A new sample.
    """
    linear = matrix[:3, :3]
    scale = np.linalg.norm(linear[0])
    out = dict(sample)
    out["xyz"] = (sample["xyz"] @ linear.T.astype(np.float32) + matrix[:3, 3]).astype(np.float32)
    out["boxes_center"] = (sample["boxes_center"] @ linear.T + matrix[:3, 3]).astype(np.float32)
    size = sample["boxes_size"] * scale
    yaw = sample["boxes_yaw"]
    if refit_boxes:
        c, s = np.abs(linear[0, 0]) / scale, np.abs(linear[0, 1]) / scale
        size = np.stack(
            [c * size[:, 0] + s * size[:, 1], s * size[:, 0] + c * size[:, 1], size[:, 2]], axis=1
        )
    else:
        direction = np.stack([np.cos(yaw), np.sin(yaw)], axis=1) @ linear[:2, :2].T
        yaw = np.arctan2(direction[:, 1], direction[:, 0])
    out["boxes_size"] = size.astype(np.float32)
    out["boxes_yaw"] = yaw.astype(np.float32)
    return out
