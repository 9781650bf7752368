"""VRDistill: a VoteNet of half the width learns from refined votes of a wide one, on SynthRooms.

    python -m vrdistill_jax.train --config=configs/synthrooms.py:teacher --workdir=runs/teacher
    python -m vrdistill_jax.train --config=configs/distill/vrdistill_half.py --config.teacher.checkpoint=runs/teacher

configs/distill/student.py does the same for other methods, sizes and datasets; docs/distillation.md explains the knobs.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import student_config


def get_config(size: str = "teacher") -> ConfigDict:
    return student_config(("vrdistill",), "half", size)
