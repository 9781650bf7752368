"""Distillers: what a student learns from a teacher besides the labels; one file each, beside the paper it implements.

A distiller is a module with
  default_config() -> ConfigDict                   its entry of config.distiller.methods, with every knob
  build(config, student, teacher, axis_name=None) -> nn.Module
                                                   `config` is that entry; `student` and `teacher` are the two
                                                   config.detector sections; axis_name is the device axis of means
whose network is called as
  module.apply({"params": ...}, student, teacher, scene, aligned=..., train=..., rngs={"distiller": key})
      -> (total, terms)
with `student` and `teacher` DetectorOutputs of the same clouds (the teacher's under stop_gradient), total a scalar (the entry's
weight in it) and terms a dict of scalars. What else a network reads, it says by attributes, False where they are missing:
  needs_aligned   `aligned` is the student's DetectorOutput with the teacher's cluster indices (else None)
  needs_judge     it is also called with judge=(votes) -> the detection loss of the teacher's own head on other votes
Learnable parts (alignment, refinement, generators) live in state.distiller.params of the training state, and are dropped at
test time.
"""

from types import ModuleType

from vrdistill_jax.distillers import fgd, itkd, mgd, pgd, seed, sparsekd, vrdistill

DISTILLERS: dict[str, ModuleType] = {
    "vrdistill": vrdistill,
    "seed": seed,
    "fgd": fgd,
    "mgd": mgd,
    "pgd": pgd,
    "itkd": itkd,
    "sparsekd": sparsekd,
}


def find_distiller(name: str) -> ModuleType:
    """Returns the module of a distiller.

    Raises:
      ValueError: listing the known names.
    """
    if name not in DISTILLERS:
        raise ValueError(f"unknown distiller {name!r}; known: {', '.join(sorted(DISTILLERS))}")
    return DISTILLERS[name]
