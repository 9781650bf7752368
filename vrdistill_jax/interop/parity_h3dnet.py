"""Compares our H3DNet with the official one: forward pass, decoding, which boxes are kept.

A golden folder holds inputs.npz, outputs.npz, outputs_features.npz, outputs_features_slices.npz, outputs_vote_fps.npz,
outputs_with_angle_false.npz and parse_configs.json. Only inputs and outputs.npz are required.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import h3dnet
from vrdistill_jax.detectors.h3dnet_primitives import PRESENT, place_primitives
from vrdistill_jax.detectors.votenet import predictions_from_head
from vrdistill_jax.geometry.boxes import corners_from_boxes, join_boxes
from vrdistill_jax.geometry.frames import camera_from_depth
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.interop.name_map import Variables
from vrdistill_jax.interop.parity import ParityTable, has_file, load_arrays
from vrdistill_jax.interop.parity_votenet import check_geometry
from vrdistill_jax.structs import DetectorOutput, PointPyramid, Points, Predictions

# Relative to a tensor's largest value. Behind the towers lie twice as many layers as in VoteNet, and primitives 100 m away
# enter the matching layers as coordinates of +-200.
FORWARD, HEAD, REFINED = 2e-5, 1e-4, 2e-4
# A point this close (metres) to the radius of a ball falls on either side: rounding moves votes by up to 3e-6, the centres of
# faces by up to 6e-5. What then differs is left out of the comparison, as long as it is a small share.
NEAR_VOTE, NEAR_FACE, FLIPPED_SHARE = 2e-5, 1e-4, 0.01

_PRIMITIVES = {
    "pred_flag_{}": ("flag_logits", True),
    "vote_{}": ("votes.xyz", False),
    "vote_{}_feature": ("votes.features", True),
    "aggregated_vote_xyz_{}": ("votes.xyz", False),
    "aggregated_feature_{}": ("features", True),
    "center_{}": ("center", False),
    "size_residuals_{}": ("size", False),
    "sem_cls_scores_{}": ("class_logits", False),
}
_HEAD = {
    "objectness_scores": "objectness_logits",
    "center": "center",
    "heading_scores": "heading_logits",
    "heading_residuals_normalized": "heading_residual",
    "size_scores": "size_logits",
    "size_residuals_normalized": "size_residual",
    "sem_cls_scores": "class_logits",
}


class Flips(NamedTuple):
    """Rows that differ because some point lies just at the radius of their ball, or because such a row feeds them."""

    votes: dict[str, np.ndarray]  # of the groups around the votes of each kind of primitive, bool[B, N]
    clusters: np.ndarray  # bool[B, Q]
    sides: np.ndarray  # of the six faces and twelve edges of each box, bool[B, 18, Q]

    @property
    def proposals(self) -> np.ndarray:
        """Boxes that any of it reaches: bool[B, Q]."""
        return self.clusters | self.sides.any(1)


def check_h3dnet(
    variables: Variables,
    config: ConfigDict,
    golden: str | pathlib.Path,
    inputs: str | pathlib.Path | None = None,
) -> ParityTable:
    """Runs every comparison that the golden folder has numbers for.

    Args:
      variables: imported from the folder's weights.
      config: the whole config that belongs to them.
      golden: the folder.
      inputs: where inputs.npz lies, if elsewhere.

    Returns:
      The table; files that the folder lacks are listed in `skipped`.

    Raises:
      ValueError: if inputs or outputs.npz are missing or are for another config.
    """
    golden, inputs = pathlib.Path(golden), pathlib.Path(inputs or golden)
    for path in (inputs / "inputs.npz", golden / "outputs.npz"):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; --golden and --inputs must name folders of reference numbers"
            )
    table = ParityTable()
    cloud = load_arrays(inputs / "inputs.npz")["point_clouds"]
    width = 3 + h3dnet.feature_size(config.detector.input_features)
    if cloud.ndim != 3 or cloud.shape[2] != width:
        raise ValueError(
            f"{inputs}/inputs.npz has clouds {cloud.shape}, the checkpoint reads [B, N, {width}]"
        )
    points = Points(cloud[..., :3], cloud[..., 3:], np.ones(cloud.shape[:2], bool))
    pyramid_config = h3dnet.pyramid_config(config.detector)
    one = [build_point_pyramid(xyz, np.ones(len(xyz), bool), pyramid_config) for xyz in points.xyz]
    pyramid: PointPyramid = jax.tree.map(lambda *rows: np.stack(rows), *one)

    def run(**changes) -> DetectorOutput:
        own = ConfigDict(config.to_dict())
        own.detector.update(changes)
        model = h3dnet.build(own.detector)
        apply = jax.jit(lambda v, p, g: model.apply(v, p, g, train=False))
        return jax.tree.map(np.asarray, apply(variables, points, pyramid))

    stored = load_arrays(golden / "outputs.npz")
    for name in ("outputs_features.npz", "outputs_features_slices.npz"):
        if has_file(table, golden / name):
            stored |= load_arrays(golden / name)
    output = run(cluster_sampling_eval="seed_fps")
    check_geometry(table, stored, pyramid)
    flips = find_flips(stored, output.raw, config.detector)
    check_forward(table, stored, output, flips)
    check_refinement(table, stored, output, config, flips)
    if has_file(table, golden / "parse_configs.json"):
        options = json.loads((golden / "parse_configs.json").read_text())["eval"]
        check_parsing(table, stored, output, config, flips, options)
    # Decoded boxes of the same weights in the two other settings of the reference.
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "outputs_vote_fps.npz": ("vote_fps:", {"cluster_sampling_eval": "vote_fps"}),
        "outputs_with_angle_false.npz": (
            "with_angle_false:",
            {"cluster_sampling_eval": "seed_fps", "turn_primitives": False},
        ),
    }
    for name, (prefix, changes) in others.items():
        if has_file(table, golden / name):
            own, changed = load_arrays(golden / name), run(**changes)
            own_flips = find_flips(own, changed.raw, config.detector, flips.votes)
            check_refinement(table, own, changed, config, own_flips, prefix)
    return table


def find_flips(
    golden: dict, raw: h3dnet.H3DNetRaw, config: Any, votes: dict[str, np.ndarray] | None = None
) -> Flips:
    """Rows of ours that differ from theirs and have an excuse: a point at just the radius of the ball that they look into.

    Args:
      golden: the arrays of a file.
      raw: our output.
      config: config.detector.
      votes: those of the primitives, where another file holds what tells them.
    """
    if votes is None:
        votes = {}
        for kind, primitive in raw.primitives.items():
            centers = np.asarray(primitive.votes.xyz)
            differ = _rows_differ(golden, f"center_{kind}", primitive.center, HEAD)
            differ |= _rows_differ(golden, f"sem_cls_scores_{kind}", primitive.class_logits, HEAD)
            votes[kind] = _excused(differ, centers, centers, config.aggregation_radius, NEAR_VOTE)
    differ = _rows_differ(golden, "conv3_raw", raw.head_channels, HEAD, channels_first=True)
    differ |= _rows_differ(golden, "centercenter", raw.head.center, HEAD)
    clusters = _excused(differ, raw.clusters.xyz, raw.votes.xyz, config.aggregation_radius, NEAR_VOTE)

    refinement, placed = (
        raw.refinement,
        {k: np.asarray(place_primitives(p)) for k, p in raw.primitives.items()},
    )
    batch, _, count = refinement.match_logits.shape[:3]
    differ = np.zeros((batch, 18 * count), bool)
    for name, values in (
        ("match_scores", refinement.match_logits),
        ("match_scores_sem", refinement.class_match_logits),
    ):
        differ |= _rows_differ(golden, name, np.reshape(values, (*differ.shape, -1)), REFINED)
    faces, edges = np.split(differ.reshape(batch, 18, count), [6], axis=1)
    for name, features, rows in (
        ("match_surface_features", refinement.face_features, faces),
        ("match_line_features", refinement.edge_features, edges),
    ):
        flat = np.reshape(features, (batch, -1, features.shape[-1]))
        rows |= _rows_differ(golden, name, flat, REFINED, channels_first=True).reshape(rows.shape)
    sides = []
    for rows, of_sides, kinds in (
        (faces, refinement.face_centers, ("z", "xy")),
        (edges, refinement.edge_centers, ("line",)),
    ):
        points, moved = (np.concatenate([of[kind] for kind in kinds], 1) for of in (placed, votes))
        found = _excused(
            rows.reshape(batch, -1),
            np.reshape(of_sides, (batch, -1, 3)),
            points,
            config.match_radius,
            NEAR_FACE,
            moved,
        )
        sides.append(found.reshape(rows.shape) | clusters[:, None])
    return Flips(votes, clusters, np.concatenate(sides, 1))


def _rows_differ(
    golden: dict, name: str, ours: Any, tolerance: float, channels_first: bool = False
) -> np.ndarray:
    """Which rows of f[B, N, C] the file has otherwise: bool[B, N]; none where it does not hold the whole array."""
    ours = np.asarray(ours)
    theirs = golden.get(name)
    if theirs is not None and channels_first:
        theirs = np.moveaxis(theirs, 1, -1)
    if theirs is None or theirs.shape != ours.shape:
        return np.zeros(ours.shape[:2], bool)
    return np.max(np.abs(ours - theirs), axis=-1) > tolerance * np.max(np.abs(theirs))


def _excused(
    differ: np.ndarray,
    centers: Any,
    points: Any,
    radius: float,
    margin: float,
    moved: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of `differ`, bool[B, N], with a point at the radius (within `margin`) or one of `moved`, bool[B, M], in the ball."""
    excused = np.zeros_like(differ)
    for b, row in np.argwhere(differ):
        distance = np.linalg.norm(np.asarray(points[b], np.float64) - np.asarray(centers[b])[row], axis=-1)
        excused[b, row] = np.abs(distance - radius).min() < margin
        if moved is not None:
            excused[b, row] |= (moved[b] & (distance < radius + margin)).any()
    return excused


def _add_flips(table: ParityTable, name: str, flipped: np.ndarray) -> None:
    table.add_exact(name, flipped, np.zeros_like(flipped), int(np.ceil(FLIPPED_SHARE * flipped.size)))


def check_forward(table: ParityTable, golden: dict, output: DetectorOutput, flips: Flips) -> None:
    """Everything between cloud and initial proposals."""
    raw, add = output.raw, _Adder(table, golden)
    tower = raw.towers[0]
    for n, features in enumerate(tower.abstractions, 1):
        add(f"sa{n}_features", features, FORWARD, channels_first=True)
    for suffix, tower in zip(("", "net1", "net2", "net3"), raw.towers, strict=False):
        add(f"fp2_features{suffix}", tower.seeds.features, FORWARD, channels_first=True)
    table.add_exact("seed_inds", raw.seeds.seed_index, golden["seed_inds"])
    add("seed_xyz", raw.seeds.xyz, 0.0)
    add("hd_feature", raw.seeds.features, HEAD, channels_first=True)
    add("vote_xyz", raw.votes.xyz, FORWARD)
    add("vote_features", raw.votes.features, HEAD, channels_first=True)
    for kind, primitive in raw.primitives.items():
        _add_flips(table, f"flipped_votes_{kind}", flips.votes[kind])
        for name, (path, channels_first) in _PRIMITIVES.items():
            value, behind_ball = primitive, not path.startswith(("votes", "flag"))
            for field in path.split("."):
                value = getattr(value, field)
            if value.shape[-1]:
                rows = flips.votes[kind] if behind_ball else None
                add(name.format(kind), value, HEAD, channels_first, rows)
        probability = np.asarray(jax.nn.softmax(primitive.flag_logits, -1))[..., 1]
        name = f"pred_{kind}_ind"
        if name in golden:  # hard decisions: the reference keeps 2e-4 away from the threshold
            table.add_exact(name, probability > PRESENT, golden[name] > 0)
    _add_flips(table, "flipped_clusters", flips.clusters)
    add("final_vote_aggregation_features", raw.clusters.features, HEAD, True, flips.clusters)
    add("conv3_raw", raw.head_channels, HEAD, True, flips.clusters)


def check_refinement(
    table: ParityTable,
    golden: dict,
    output: DetectorOutput,
    config: ConfigDict,
    flips: Flips,
    prefix: str = "",
) -> None:
    """Clusters, matching and both heads, as many of them as the file holds."""
    raw, add = output.raw, _Adder(table, golden, prefix)
    if "aggregated_vote_inds" in golden:
        table.add_exact(f"{prefix}aggregated_vote_inds", raw.cluster_index, golden["aggregated_vote_inds"])
    for mode in ("center", "opt"):
        add(f"aggregated_vote_xyz{mode}", raw.clusters.xyz, HEAD)
    placed = {kind: np.asarray(place_primitives(p)) for kind, p in raw.primitives.items()}
    classes = {kind: p.class_logits for kind, p in raw.primitives.items()}
    of_faces = np.concatenate([flips.votes["z"], flips.votes["xy"]], 1)
    for name, values in (("center", placed), ("sem", classes)):
        add(f"surface_{name}_pred", np.concatenate([values["z"], values["xy"]], 1), HEAD, without=of_faces)
        add(f"line_{name}_pred", values["line"], HEAD, without=flips.votes["line"])

    refinement = raw.refinement
    batch = len(refinement.channels)
    moved = np.broadcast_to(flips.clusters[:, None], flips.sides.shape)
    _add_flips(table, f"{prefix}flipped_faces", flips.sides)
    for name, value, channels_first, rows in (
        ("surface_center_object", refinement.face_centers, False, moved[:, :6]),
        ("line_center_object", refinement.edge_centers, False, moved[:, 6:]),
        ("match_surface_features", refinement.face_features, True, flips.sides[:, :6]),
        ("match_line_features", refinement.edge_features, True, flips.sides[:, 6:]),
        ("match_scores", refinement.match_logits, False, flips.sides),
        ("match_scores_sem", refinement.class_match_logits, False, flips.sides),
    ):
        add(
            name,
            value.reshape(batch, -1, value.shape[-1]),
            REFINED,
            channels_first,
            rows.reshape(batch, -1),
        )
    add("conv_refine4_raw", refinement.channels, REFINED, True, flips.proposals)

    mean_sizes = np.asarray(config.detector.mean_sizes, np.float32)
    for mode, head, tolerance, rows in (
        ("center", raw.head, HEAD, flips.clusters),
        ("opt", raw.refined_head, REFINED, flips.proposals),
    ):
        if mode == "opt":  # there the reference reads the class scores off the channels of the size scores
            head = head._replace(class_logits=head.size_logits)
        unit = np.float32(np.pi / head.heading_logits.shape[-1])
        values = {name: getattr(head, field) for name, field in _HEAD.items()}
        values |= {
            "centerres": head.center - raw.clusters.xyz,
            "heading_residuals": head.heading_residual * unit,
            "size_residuals": head.size_residual * mean_sizes,
        }
        for name, value in values.items():
            add(name + mode, value, tolerance, without=rows)


def check_parsing(
    table: ParityTable,
    golden: dict,
    output: DetectorOutput,
    config: ConfigDict,
    flips: Flips,
    options: dict,
) -> None:
    """Which boxes survive suppression, and their scores, with the heading and the classes of either stage."""
    for angle in (False, True):
        for classes in (False, True):
            name = f"parse_optang{int(angle)}_optsem{int(classes)}"
            if f"{name}_pred_mask" not in golden:
                continue
            predictions = _decode(output, config, angle, classes)
            boxes = np.asarray(join_boxes(predictions.center, predictions.size, predictions.yaw))
            label = predictions.class_logits.argmax(-1)
            probability = np.asarray(jax.nn.softmax(predictions.class_logits, -1))
            corners = np.asarray(camera_from_depth(corners_from_boxes(jnp.asarray(boxes))))
            kept = np.stack(
                [
                    np.asarray(
                        nms(
                            box,
                            score,
                            jnp.ones(len(box), bool),
                            jnp.asarray(groups) if options["cls_nms"] else None,
                            threshold=options["nms_iou"],
                        ).mask
                    )
                    for box, score, groups in zip(boxes, predictions.objectness, label, strict=True)
                ]
            )
            # A box that is moved by a flipped face may stay or go, and others with it.
            flipped = flips.proposals
            theirs = golden[f"{name}_pred_mask"] > 0
            table.add_exact(f"{name}_pred_mask", kept, theirs, 2 * int(flipped.sum()))
            for b in range(len(boxes)):
                if (kept[b] != theirs[b]).any():
                    table.skipped.append(f"{name}: scores and corners of sample {b}, other boxes are kept")
                    continue
                rows = np.flatnonzero(kept[b] & (predictions.objectness[b] > options["conf_thresh"]))
                corners_of = golden[f"{name}_corners_{b}"]
                if len(rows) != len(corners_of):  # some score fell on the other side of the threshold
                    table.add(f"{name}_corners_{b}", corners[b][rows], corners_of, REFINED)
                    continue
                same = ~flipped[b][rows]
                score = predictions.objectness[b][rows] * probability[b][rows].T  # class after class
                expected = golden[f"{name}_score_{b}"].reshape(score.shape)
                table.add(f"{name}_score_{b}", score[:, same], expected[:, same], REFINED)
                table.add(f"{name}_corners_{b}", corners[b][rows[same]], corners_of[same], REFINED)


def _decode(output: DetectorOutput, config: ConfigDict, angle: bool, classes: bool) -> Predictions:
    raw = output.raw
    head = h3dnet.final_head(raw.head, raw.refined_head, oriented=angle)
    if classes:
        head = head._replace(class_logits=raw.refined_head.size_logits)
    if not config.detector.oriented:  # one bin stands for no heading
        head = head._replace(
            heading_logits=head.heading_logits[..., :1], heading_residual=head.heading_residual[..., :1]
        )
    predictions = predictions_from_head(head, raw.clusters.mask, config.detector.mean_sizes)
    return jax.tree.map(np.asarray, predictions)


class _Adder:
    """Compares an array if the file holds it, whole or strided, without the rows bool[B, N] of `without`."""

    def __init__(self, table: ParityTable, golden: dict, prefix: str = ""):
        self.table, self.golden, self.prefix = table, golden, prefix
        self.stored = {name.partition("__")[0] for name in golden}

    def __call__(
        self,
        name: str,
        value: np.ndarray,
        tolerance: float,
        channels_first: bool = False,
        without: np.ndarray | None = None,
    ) -> None:
        if name not in self.stored:
            return
        golden, label = self.golden, self.prefix + name
        if without is None or not without.any():
            self.table.add_stored(golden, name, value, tolerance, channels_first, label=label)
            return
        kept = np.broadcast_to(~without.reshape(*without.shape, *[1] * (value.ndim - 2)), value.shape)
        if channels_first:
            value, kept = np.moveaxis(value, -1, 1), np.moveaxis(kept, -1, 1)
        start, step = 0, 1
        if name not in golden:
            start, step = (int(n) for n in golden[f"{name}__slice_start_step"])
        theirs = golden[name if name in golden else f"{name}__slice"].reshape(-1)
        ours, kept = (np.asarray(x).reshape(-1)[start::step] for x in (value, kept))
        self.table.add(label, ours[kept], theirs[kept], tolerance)
