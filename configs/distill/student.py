"""A narrow detector that learns from a wide one, by any method.

    python -m vrdistill_jax.train --config=configs/synthrooms.py:teacher --workdir=runs/teacher
    python -m vrdistill_jax.train --config=configs/distill/student.py:vrdistill,half --config.teacher.checkpoint=runs/teacher

After the colon: METHOD[,WIDTH[,SIZE[,DATASET[,DETECTOR[,TEACHER]]]]].
  METHOD   vrdistill, seed, fgd, mgd, pgd, itkd, sparsekd; several are joined by + (seed+vrdistill); none trains the student on
           its own, for comparison
  WIDTH    half (default), quarter or same, relative to the teacher
  SIZE     teacher (default; few points), full (the published sizes and schedule, for a GPU) or tiny (for tests): what the
           teacher was trained with
  DATASET  synthrooms (default), synthrooms_view, scannet or sunrgbd
  DETECTOR votenet (default) or another of recipes.DETECTOR_RECIPES
  TEACHER  the teacher's detector; default the student's. It may be of another family and read other input (colour, voxels).
Every knob of a method can be set: --config.distiller.methods.vrdistill.layers=2. docs/distillation.md lists them.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import student_config


def get_config(arguments: str = "") -> ConfigDict:
    if not arguments:
        raise ValueError("name a method: --config=configs/distill/student.py:vrdistill,half")
    method, *rest = arguments.split(",")
    if len(rest) > 5:
        raise ValueError(
            f"expected METHOD,WIDTH,SIZE,DATASET,DETECTOR,TEACHER after the colon, got {arguments!r}"
        )
    return student_config(() if method == "none" else tuple(method.split("+")), *rest)
