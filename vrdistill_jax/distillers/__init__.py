"""Distillers: what a student learns from a teacher besides the labels; one file each, beside the paper it implements.

A distiller is a module with
  build(config, student, teacher) -> nn.Module     `config` is one entry of config.distiller.methods; `student` and
                                                   `teacher` are the two config.detector sections
  NEEDS_ALIGNED: bool                              whether it compares proposals one by one and therefore needs the
                                                   student's proposals at the teacher's clusters
whose network is called as
  module.apply({"params": ...}, student, teacher, scene, aligned=..., train=..., rngs={"distiller": key})
      -> (total, terms)
with `student` and `teacher` DetectorOutputs of the same clouds (the teacher's under stop_gradient), `aligned` the student's
DetectorOutput with the teacher's cluster indices (None unless NEEDS_ALIGNED), total a scalar and terms a dict of scalars.
Learnable parts (alignment, refinement, generators) live in params["distiller"] of the training state, and are dropped at
test time.
"""
