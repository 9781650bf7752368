"""VoteNet at batch 1, from the cloud of a scan to boxes, stage by stage."""

from functools import partial

import jax
import numpy as np

from vrdistill_jax.benchmarks.cases import scanned_room, synthrooms_config
from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.samples import unlabelled_scene
from vrdistill_jax.detectors import votenet
from vrdistill_jax.detectors.decoding import PREDICT
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.structs import Detections
from vrdistill_jax.training.state import count_parameters, init_variables
from vrdistill_jax.training.step import make_predict_step

WIDTHS = {1.0: "1", 0.5: "1/2", 0.25: "1/4"}


def run(recorder: Recorder) -> None:
    """Times widths 1, 1/2 and 1/4 at 20,000 points; random weights."""
    quick = recorder.effort.quick
    for width, name in {0.25: "1/4"}.items() if quick else WIDTHS.items():
        config = synthrooms_config("tiny" if quick else "full", width=width)
        num_points = 2000 if quick else 20000
        _time_network(recorder, config, num_points, f"width {name}, {num_points} points")


def _time_network(recorder: Recorder, config, num_points: int, case: str) -> None:
    cloud = scanned_room(num_points)
    pyramid_config = votenet.pyramid_config(config.detector)
    model = votenet.build(config.detector)

    def prepare():
        rng = np.random.default_rng(0)
        return unlabelled_scene(cloud, None, num_points, config.detector.input_features, rng)

    def build(scene):
        return build_point_pyramid(scene.points.xyz, scene.points.mask, pyramid_config)

    scene = prepare()
    batch, pyramid = stack_trees([(scene, build(scene))])
    variables = init_variables(model, jax.random.key(0), batch.points, pyramid)
    forward = jax.jit(lambda v, points, p: model.apply(v, points, p, train=False))
    decode = jax.jit(lambda output, points: votenet.decode(output, points, config.detector, PREDICT))
    predict = make_predict_step(model, votenet.decode, config.detector, PREDICT)
    output = forward(variables, batch.points, pyramid)

    def cloud_to_boxes() -> Detections:
        """What predict.Predictor does with one cloud."""
        scene = prepare()
        stacked, pyramid = stack_trees([(scene, build(scene))])
        return jax.tree.map(np.asarray, predict(variables, stacked.points, pyramid))

    time = partial(recorder.time, "votenet", case)
    time("subsample, features", prepare)
    time("pyramid (host, one core)", lambda: build(scene))
    time("network", lambda: forward(variables, batch.points, pyramid))
    time("decode (suppression)", lambda: decode(output, batch.points))
    parameters = count_parameters(variables["params"])
    time("total: cloud to boxes", cloud_to_boxes, scenes=1, parameters=parameters, cloud_points=len(cloud))
