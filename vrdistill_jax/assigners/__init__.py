"""Assigners: which anchors of a dense head a ground-truth box trains; one file each, beside its paper.

An assigner is a module with
  default_config() -> ConfigDict         every knob; an entry of config.detector.assigners
  assign(anchors, boxes, config, task) -> Assignment
where `anchors` and `boxes` are padded batches, `config` is that entry and `task` says what the data decides (turned boxes,
levels of the classes). Assignment has no gradients, runs under jit and vmap, ignores pads, and gives no positives in a scene
without boxes.
"""

from types import ModuleType

from vrdistill_jax.assigners import alignota, fcaf3d, ota, simota, spota, top_k

ASSIGNERS: dict[str, ModuleType] = {
    "top_k": top_k,
    "fcaf3d": fcaf3d,
    "spota": spota,
    "ota": ota,
    "simota": simota,
    "alignota": alignota,
}


def find_assigner(name: str) -> ModuleType:
    """Returns the module of an assigner.

    Raises:
      ValueError: listing the known names.
    """
    if name not in ASSIGNERS:
        raise ValueError(f"unknown assigner {name!r}; known: {', '.join(sorted(ASSIGNERS))}")
    return ASSIGNERS[name]
