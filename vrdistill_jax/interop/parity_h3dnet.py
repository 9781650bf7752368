"""Compares our H3DNet with the official one: forward pass, decoding, which boxes are kept.

A golden folder holds inputs.npz, outputs.npz, outputs_features.npz, outputs_features_slices.npz, outputs_vote_fps.npz,
outputs_with_angle_false.npz and parse_configs.json. Only inputs and outputs.npz are required.
"""

import json
import pathlib
from typing import Any

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
# A primitive this close (metres) to the radius around a face or edge falls on either side: rounding moves the centres of faces
# by up to 6e-5. What then differs is left out of the comparison, as long as there are few such faces and edges.
UNDECIDED, FLIPPED_FACES = 1e-4, 16

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
    check_forward(table, stored, output)
    check_refinement(table, stored, output, config, "")
    if has_file(table, golden / "parse_configs.json"):
        options = json.loads((golden / "parse_configs.json").read_text())["eval"]
        check_parsing(table, stored, output, config, options)
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
            check_refinement(table, load_arrays(golden / name), run(**changes), config, prefix)
    return table


def check_forward(table: ParityTable, golden: dict, output: DetectorOutput) -> None:
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
        for name, (path, channels_first) in _PRIMITIVES.items():
            value = primitive
            for field in path.split("."):
                value = getattr(value, field)
            if value.shape[-1]:
                add(name.format(kind), value, HEAD, channels_first)
        probability = np.asarray(jax.nn.softmax(primitive.flag_logits, -1))[..., 1]
        name = f"pred_{kind}_ind"
        if name in golden:  # hard decisions: the reference keeps 2e-4 away from the threshold
            table.add_exact(name, probability > PRESENT, golden[name] > 0)
    add("final_vote_aggregation_features", raw.clusters.features, HEAD, channels_first=True)
    add("conv3_raw", raw.head_channels, HEAD, channels_first=True)


def check_refinement(
    table: ParityTable, golden: dict, output: DetectorOutput, config: ConfigDict, prefix: str
) -> None:
    """Clusters, matching and both heads, as many of them as the file holds."""
    raw, add = output.raw, _Adder(table, golden, prefix)
    if "aggregated_vote_inds" in golden:
        table.add_exact(f"{prefix}aggregated_vote_inds", raw.cluster_index, golden["aggregated_vote_inds"])
    for mode in ("center", "opt"):
        add(f"aggregated_vote_xyz{mode}", raw.clusters.xyz, HEAD)
    placed = {kind: np.asarray(place_primitives(p)) for kind, p in raw.primitives.items()}
    add("surface_center_pred", np.concatenate([placed["z"], placed["xy"]], 1), HEAD)
    add("line_center_pred", placed["line"], HEAD)
    classes = {kind: p.class_logits for kind, p in raw.primitives.items()}
    add("surface_sem_pred", np.concatenate([classes["z"], classes["xy"]], 1), HEAD)
    add("line_sem_pred", classes["line"], HEAD)

    refinement = raw.refinement
    batch = len(refinement.channels)
    flipped = find_flipped_faces(golden, raw, config.detector.match_radius)
    table.add_exact(f"{prefix}flipped_faces", flipped, np.zeros_like(flipped), FLIPPED_FACES)
    rows: np.ndarray | None
    for name, value, channels_first, rows in (
        ("surface_center_object", refinement.face_centers, False, None),
        ("line_center_object", refinement.edge_centers, False, None),
        ("match_surface_features", refinement.face_features, True, flipped[:, :6]),
        ("match_line_features", refinement.edge_features, True, flipped[:, 6:]),
        ("match_scores", refinement.match_logits, False, flipped),
        ("match_scores_sem", refinement.class_match_logits, False, flipped),
    ):
        rows = rows if rows is None else rows.reshape(batch, -1)
        add(name, value.reshape(batch, -1, value.shape[-1]), REFINED, channels_first, rows)
    proposals = np.asarray(flipped.any(1))
    add("conv_refine4_raw", refinement.channels, REFINED, True, proposals)

    mean_sizes = np.asarray(config.detector.mean_sizes, np.float32)
    for mode, head, tolerance, rows in (
        ("center", raw.head, HEAD, None),
        ("opt", raw.refined_head, REFINED, proposals),
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


def find_flipped_faces(golden: dict, raw: h3dnet.H3DNetRaw, radius: float) -> np.ndarray:
    """Faces and edges whose scores differ and that have a primitive at just the radius: bool[B, 18, Q]."""
    ours, placed = raw.refinement.match_logits, {k: place_primitives(p) for k, p in raw.primitives.items()}
    flipped = np.zeros(ours.shape[:3], bool)
    if "match_scores" not in golden:
        return flipped
    theirs = golden["match_scores"].reshape(ours.shape)
    differs = np.abs(ours - theirs).max(-1) > REFINED * np.abs(theirs).max()
    sides = np.concatenate([placed["z"], placed["xy"]], 1), np.asarray(placed["line"])
    for b, row, q in np.argwhere(differs):
        if row < 6:
            center, primitives = raw.refinement.face_centers[b, row, q], sides[0][b]
        else:
            center, primitives = raw.refinement.edge_centers[b, row - 6, q], sides[1][b]
        distance = np.linalg.norm(primitives.astype(np.float64) - center, axis=-1)
        flipped[b, row, q] = np.abs(distance - radius).min() < UNDECIDED
    return flipped


def check_parsing(
    table: ParityTable, golden: dict, output: DetectorOutput, config: ConfigDict, options: dict
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
            flipped = find_flipped_faces(golden, output.raw, config.detector.match_radius).any(1)
            flipped = np.asarray(flipped)
            theirs = golden[f"{name}_pred_mask"] > 0
            table.add_exact(f"{name}_pred_mask", kept, theirs, 2 * int(flipped.sum()))
            for b in range(len(boxes)):
                if (kept[b] != theirs[b]).any():
                    table.skipped.append(f"{name}: scores and corners of sample {b}, other boxes are kept")
                    continue
                rows = np.flatnonzero(kept[b] & (predictions.objectness[b] > options["conf_thresh"]))
                same = ~flipped[b][rows]
                score = predictions.objectness[b][rows] * probability[b][rows].T  # class after class
                expected = golden[f"{name}_score_{b}"].reshape(score.shape)
                table.add(f"{name}_score_{b}", score[:, same], expected[:, same], REFINED)
                expected = golden[f"{name}_corners_{b}"][same]
                table.add(f"{name}_corners_{b}", corners[b][rows[same]], expected, REFINED)


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
