"""The same work done by other libraries, where they are installed, measured in the same run.

`ratio` of a peer's row is its time over ours: above 1, ours is faster.
"""

from functools import partial

import jax
import numpy as np

from vrdistill_jax.benchmarks.cases import room_cloud, synthrooms_config
from vrdistill_jax.benchmarks.recorder import Recorder, compare, usable_cores
from vrdistill_jax.benchmarks.torch_votenet import make_forward
from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.samples import unlabelled_scene
from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry.host.neighbors import find_three_nearest, query_ball
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.geometry.host.sampling import sample_farthest_points
from vrdistill_jax.training.state import init_variables

SAME = 1e-3  # of the largest output: how far the same network in two libraries may differ ...
SHARE_SAME = 0.99  # ... for at least this share of outputs (a vote on the rim of a ball may fall either way)


def run(recorder: Recorder) -> None:
    """Compares sampling, neighbour search and the network."""
    quick = recorder.effort.quick
    num_points, size = (2000, "tiny") if quick else (20000, "full")
    config = synthrooms_config(size)
    first = votenet.pyramid_config(config.detector).levels[0]
    xyz = room_cloud(num_points)
    centers = xyz[sample_farthest_points(xyz, first.num_centers)]
    _compare_sampling(recorder, xyz, first.num_centers)
    _compare_neighbors(recorder, xyz, centers, first)
    for width in (0.25,) if quick else (1.0, 0.5, 0.25):
        _compare_network(recorder, xyz, synthrooms_config(size, width=width))


def _compare_sampling(recorder: Recorder, xyz: np.ndarray, num_samples: int) -> None:
    time = partial(recorder.time, "peers", f"sampling, {len(xyz)} -> {num_samples}")
    ours = time("ours (numba)", lambda: sample_farthest_points(xyz, num_samples))
    try:
        import fpsample
    except ImportError:
        recorder.skip("peers", "fpsample", "not installed: pip install fpsample")
        return
    start = {"start_idx": 0}
    for name, sample in (
        ("fpsample bucket_fps_kdline, h=7", partial(fpsample.bucket_fps_kdline_sampling, h=7)),
        ("fpsample fps (plain)", fpsample.fps_sampling),
    ):
        compare(ours, time(name, partial(sample, xyz, num_samples, **start)))


def _compare_neighbors(recorder: Recorder, xyz: np.ndarray, centers: np.ndarray, level) -> None:
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        recorder.skip("peers", "scipy", "not installed: pip install scipy")
        return
    count = level.num_neighbors

    def scipy_ball_query():
        """The tree, the query, and the first `count` rows of each ball, short ones filled up, as ours gives them."""
        index = np.empty((len(centers), count), np.int32)
        balls = cKDTree(xyz).query_ball_point(centers, level.radius, return_sorted=True)
        for row, ball in enumerate(balls):
            ball = ball[:count]
            index[row, : len(ball)] = ball
            index[row, len(ball) :] = ball[0]
        return index

    time = partial(recorder.time, "peers", f"ball query, {len(centers)} x {count}")
    ours = time("ours (numba)", lambda: query_ball(centers, xyz, level.radius, count))
    compare(ours, time("scipy cKDTree", scipy_ball_query))

    coarse, fine = (
        centers[: len(centers) // 4],
        centers[: len(centers) // 2],
    )  # as many as VoteNet interpolates
    time = partial(recorder.time, "peers", f"three nearest, {len(fine)} of {len(coarse)}")
    ours = time("ours (numba, exhaustive)", lambda: find_three_nearest(fine, coarse))
    compare(ours, time("scipy cKDTree", lambda: cKDTree(coarse).query(fine, k=3)))


def _compare_network(recorder: Recorder, xyz: np.ndarray, config) -> None:
    scene = unlabelled_scene(xyz, None, len(xyz), config.detector.input_features, np.random.default_rng(0))
    built = build_point_pyramid(scene.points.xyz, scene.points.mask, votenet.pyramid_config(config.detector))
    scene, pyramid = stack_trees([(scene, built)])
    points, detector = scene.points, config.detector
    model = votenet.build(detector)
    variables = init_variables(model, jax.random.key(0), points, pyramid)
    forward = jax.jit(lambda v, points, p: model.apply(v, points, p, train=False))
    raw = forward(variables, points, pyramid).raw
    cluster_index, votes = np.asarray(raw.cluster_index[0]), np.asarray(raw.votes.xyz[0])
    around = query_ball(
        votes[cluster_index], votes, detector.aggregation_radius, detector.aggregation_neighbors
    )

    time = partial(recorder.time, "peers", f"VoteNet, width {detector.width:g}, batch 1")
    ours = time("ours (with vote clustering)", lambda: forward(variables, points, pyramid))
    # Also one thread: where other programs keep the cores busy, torch's threads wait for each other.
    for threads in sorted({1, usable_cores()}):
        try:
            peer = make_forward(variables, detector, points, pyramid, cluster_index, around, threads)
        except ImportError as error:
            recorder.skip("peers", "torch", str(error))
            return
        row = time(f"torch eager, threads: {threads}", peer)
        compare(ours, row)
        row["share_same"] = _share_same(recorder, peer(), np.asarray(raw.head_channels[0]))


def _share_same(recorder: Recorder, theirs: np.ndarray, ours: np.ndarray) -> float:
    """Share of the outputs that agree; too small a one is a failure, since the ratio would mean nothing."""
    share = float(np.mean(np.abs(theirs - ours) <= SAME * np.abs(ours).max()))
    if share < SHARE_SAME:
        recorder.failures.append(
            f"peers, torch: {share:.1%} of the outputs agree with ours, expected {SHARE_SAME:.0%}; the ratio is void"
        )
    return round(share, 5)
