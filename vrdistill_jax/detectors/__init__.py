"""Detectors: each file holds a model, its pyramid, targets, loss and decoding, beside the paper it implements.

A detector is a module with
  build(config, norm_axis_name=None) -> nn.Module   the network, applied as model.apply(variables, points, pyramid, train=...)
  pyramid_config(config)                what the loader computes once per cloud
  loss(output, scene, config, axis_name=None) -> (total, terms)
  decode(output, points, config) -> Detections
where `config` is `config.detector`. A network whose proposals can be compared one by one with another's has a method
  propose_like(output, other, train=...) -> DetectorOutput   the proposals of `output`'s network where `other` has its own
One whose head can read other clusters than its own has
  propose_at(output, clusters, train=...) -> DetectorOutput
A dense network (TR3D, SR3D) predicts at every anchor and has no proposals until propose_like(output, output) chooses its best.
"""

from types import ModuleType

from vrdistill_jax.detectors import fcaf3d, groupfree3d, h3dnet, sr3d, three_detr, tr3d, votenet

DETECTORS: dict[str, ModuleType] = {
    "votenet": votenet,
    "groupfree3d": groupfree3d,
    "h3dnet": h3dnet,
    "3detr": three_detr,
    "3detr_m": three_detr,
    "tr3d": tr3d,
    "sr3d": sr3d,
    "fcaf3d": fcaf3d,
}


def find_detector(name: str) -> ModuleType:
    """Returns the module of a detector.

    Raises:
      ValueError: listing the known names.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}; known: {', '.join(sorted(DETECTORS))}")
    return DETECTORS[name]
