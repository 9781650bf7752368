"""H3DNet's training: which seeds lie on which faces and edges, and the loss.

The primitives of a scene follow from its points, its boxes and which box each point belongs to, so they are found here, on the
device, and nothing is stored (`data.primitives` is the NumPy twin). A point lies on a face if its distance from the face's
plane is within `face_distance` of the smallest one among the object's points; the face is a primitive if more than
`face_points` points lie on it and their distances vary by less than `face_variance`. It lies on an edge if it lies on the first
of the two faces that meet there and is within `edge_distance` of the second face (`edge_of_box` False: scans of whole objects)
or of the edge itself (True); the edge is a primitive if more than `edge_points` points do.

Source: Zhang et al., "H3DNet" (2020) and the repository H3DNet: scannet_detection_dataset_hd.py,
sunrgbd_detection_dataset_hd.py and loss_helper.py.
Differs: a point of an oriented scene belongs to up to three boxes by its position alone, because no semantic label per point is
stored (the reference asks for a label that fits the box). Faces and edges turn with the box; the reference turns the faces of a
rotated scene's refitted, axis-aligned boxes once more.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.detectors import votenet
from vrdistill_jax.detectors.h3dnet_primitives import (
    KINDS,
    PrimitiveOutput,
    edge_centers,
    face_centers,
    place_primitives,
)
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.losses.classification import cross_entropy
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.losses.votes import vote_distance
from vrdistill_jax.structs import Boxes, DetectorOutput, Scene

FLAG_WEIGHT = (0.4, 0.6)
MATCH_WEIGHT = (0.3, 0.7)
MATCH_DISTANCE = 0.3  # metres, between a primitive and a face or edge that it stands for

# The faces of a box as (axis, sign), in the order in which the reference labels points; later faces overwrite earlier ones.
FACES = ((2, -1), (2, 1), (0, -1), (0, 1), (1, -1), (1, 1))
# Edges as (first face, second face), rows of FACES, in the order in which points are labelled.
EDGES = (
    (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5),
)  # fmt: skip
_FACE_ROWS = {"z": slice(0, 2), "xy": slice(2, 6)}


class PrimitiveTargets(NamedTuple):
    """What the seeds should say about one kind of primitive."""

    mask: Array  # bool[B, M] whether there is one
    center: Array  # f32[B, M, 3] metres
    size: Array  # f32[B, M, D] metres, as in KINDS
    label: Array  # i32[B, M] class of the object


def primitive_targets(scene: Scene, seed_index: Int[Array, "b m"], rules: Any) -> dict[str, PrimitiveTargets]:
    """Finds the primitives that seeds lie on.

    Args:
      scene: with boxes and point_instance.
      seed_index: i32[B, M] rows of the cloud.
      rules: config.primitives.

    Returns:
      PrimitiveTargets by kind. Where a seed lies on several primitives of a kind, the last face or edge of the last box counts.
    """
    boxes = cast(Boxes, scene.boxes)
    return jax.vmap(partial(_targets_of_scene, rules=rules))(
        scene.points.xyz, scene.points.mask, scene.point_instance, boxes, seed_index
    )


def _targets_of_scene(xyz, mask, slots, boxes: Boxes, seed_index, rules) -> dict[str, PrimitiveTargets]:
    num_boxes, num_slots = len(boxes.mask), slots.shape[1]
    earlier = jnp.tril(jnp.ones((num_slots, num_slots), bool), -1)
    repeated = jnp.any((slots[:, :, None] == slots[:, None, :]) & earlier, -1)
    member = (slots >= 0) & ~repeated & mask[:, None]
    box = jnp.where(member, slots, num_boxes)  # one row more, for points of no box

    def pick(values, index):  # of boxes, the last one for points of no box
        return values.at[jnp.minimum(index, num_boxes - 1)].get(mode="clip")

    local = _turn(xyz[:, None] - pick(boxes.center, box), -_upright(pick(boxes.yaw, box)))
    half = pick(boxes.size, box) / 2
    to_face = jnp.stack([jnp.abs(local[..., axis] - sign * half[..., axis]) for axis, sign in FACES], -1)

    def per_box(values):  # sums over the members of each box
        return jax.ops.segment_sum(values.reshape(-1, *values.shape[2:]), box.reshape(-1), num_boxes + 1)

    closest = jax.ops.segment_min(to_face.reshape(-1, 6), box.reshape(-1), num_boxes + 1)
    on_face = member[..., None] & (jnp.abs(to_face - closest[box]) < rules.face_distance)
    face_count, face_middle = _middle(per_box, on_face, local)
    mean = _ratio(per_box(jnp.where(on_face, to_face, 0.0)), face_count)
    variance = _ratio(per_box(jnp.where(on_face, jnp.square(to_face - mean[box]), 0.0)), face_count)
    face_found = (face_count > rules.face_points) & (variance < rules.face_variance)
    axis = jnp.array([a for a, _ in FACES])[:, None]
    keeps = jnp.where(axis == 2, jnp.arange(3) == 2, jnp.arange(3) != 2)  # the rest is the box's
    face_middle = jnp.where(keeps, face_middle, 0.0)

    first, second = (jnp.array(rows) for rows in zip(*EDGES, strict=True))
    distance = to_face[..., second]
    if rules.edge_of_box:
        distance = jnp.sqrt(jnp.square(to_face[..., first]) + jnp.square(distance))
    on_edge = on_face[..., first] & (distance < rules.edge_distance)
    edge_count, edge_middle = _middle(per_box, on_edge, local)
    axes, signs = np.array([[FACES[f] for f in pair] for pair in EDGES]).transpose(2, 0, 1)
    ends = np.zeros((len(EDGES), 3), np.float32)
    np.put_along_axis(ends, axes, signs, 1)  # in half sizes; 0 along the edge
    if rules.edge_of_box:
        all_half = jnp.concatenate([boxes.size, boxes.size[:1]]) / 2
        edge_middle = all_half[:, None] * ends
    else:
        edge_middle = jnp.where(ends != 0, edge_middle, 0.0)

    at = {"slots": box[seed_index], "face": on_face[seed_index], "edge": on_edge[seed_index]}

    def choose(on, found, middle):
        """The last of the faces (or edges) of the last box: i32[M] box, f32[M, 3] centre, bool[M] whether there is any."""
        count = on.shape[-1]
        hit = on & found[at["slots"]]
        rank = jnp.where(hit, at["slots"][..., None] * count + jnp.arange(count), -1)
        best = jnp.max(rank.reshape(len(rank), -1), -1)
        row, which = jnp.maximum(best, 0) // count, jnp.maximum(best, 0) % count
        turned = _turn(middle[row, which], _upright(pick(boxes.yaw, row)))
        return row, pick(boxes.center, row) + turned, best >= 0

    targets = {}
    for kind in KINDS:
        if kind == "line":
            row, center, there = choose(at["edge"], edge_count > rules.edge_points, edge_middle)
        else:
            rows = _FACE_ROWS[kind]
            row, center, there = choose(at["face"][..., rows], face_found[:, rows], face_middle[:, rows])
        size = {"z": pick(boxes.size, row)[:, :2], "xy": pick(boxes.size, row)[:, 2:]}.get(
            kind, jnp.zeros((len(row), 0))
        )
        targets[kind] = PrimitiveTargets(there, center, size, pick(boxes.label, row))
    return targets


def _middle(per_box, on, local):
    """Number f32[G, F] and mean position f32[G, F, 3] (in the box's frame) of the points on each face or edge."""
    count = per_box(on.astype(jnp.float32))
    total = per_box(jnp.where(on[..., None], local[..., None, :], 0.0))
    return count, _ratio(total, count[..., None])


def _ratio(total, count):
    return total / jnp.maximum(count, 1.0)


def _turn(xyz: Float[Array, "*n 3"], angle: Float[Array, "*n"]) -> Float[Array, "*n 3"]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y, z = jnp.moveaxis(xyz, -1, 0)
    return jnp.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def _upright(yaw):
    """The reference turns boxes by at most a quarter, which decides about which of a box's sides come first."""
    return yaw - jnp.pi * jnp.round(yaw / jnp.pi)


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """H3DNet's training loss.

    Args:
      output: of the network.
      scene: with boxes and point_instance.
      config: config.detector.
      axis_name: mapped device axis over which the means are taken, or None.

    Returns:
      (scalar total, dict of scalar terms). total = 10 (VoteNet's terms of the initial proposals + 0.5 matching + potential) +
      primitives, where matching = match + class_match + (refined_objectness + matched_objectness) / 2, potential =
      refined_center + primitive_distance + refined_size_residual (+ refined_heading_residual where boxes are turned), and
      primitives = the sum over the kinds of 30 flag + 10 vote + (center + size) / 2 + class (the last three twice for lines).

    Raises:
      ValueError: if the scene has no boxes.

    Source: H3DNet, models/loss_helper.py; votes aim at the centres of boxes.
    """
    if scene.boxes is None or scene.point_instance is None:
        raise ValueError("the loss needs scene.boxes and scene.point_instance; this scene has no labels")
    raw = output.raw
    aimed = scene._replace(boxes=scene.boxes._replace(vote_center=scene.boxes.center))
    initial, terms = votenet.loss(output, aimed, config, axis_name)
    # The refined proposals have the same targets; only some of the terms are used.
    of_refined = votenet.loss(
        output._replace(raw=raw._replace(head=raw.refined_head)), aimed, config, axis_name
    )[1]
    used = ("objectness", "center", "size_residual") + (("heading_residual",) if config.oriented else ())
    terms |= {f"refined_{name}": of_refined[name] for name in used}
    terms |= matching_terms(output, scene, config, axis_name)
    matching = terms["match"] + terms["class_match"]
    matching += 0.5 * (terms["refined_objectness"] + terms["matched_objectness"])
    potential = terms["primitive_distance"] + sum(terms[f"refined_{name}"] for name in used[1:])

    targets = primitive_targets(scene, raw.seeds.seed_index, config.primitives)
    primitives = jnp.float32(0)
    for kind, target in targets.items():
        valid = raw.seeds.mask & scene.mask[:, None]
        own = primitive_terms(raw.primitives[kind], target, valid, axis_name)
        surface = 0.5 * (own["center"] + own["size"]) + own["class"]
        primitives += 30.0 * own["flag"] + 10.0 * own["vote"] + (2.0 if kind == "line" else 1.0) * surface
        terms |= {f"{kind}_{name}": value for name, value in own.items()}
    total = initial + 10.0 * (0.5 * matching + potential) + primitives
    return total, terms


def primitive_terms(
    primitive: PrimitiveOutput,
    target: PrimitiveTargets,
    valid: Bool[Array, "b m"],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    """Compares what the seeds say about one kind of primitive with the truth.

    Args:
      primitive: of the network.
      target: the truth.
      valid: bool[B, M] seeds that count.
      axis_name: mapped device axis, or None.

    Returns:
      {"flag", "vote", "center", "size", "class"}: scalars, not weighted.
    """
    mean = partial(masked_mean, axis_name=axis_name)
    there, place = target.mask & valid, target.center[:, :, None]
    flag = cross_entropy(
        primitive.flag_logits, target.mask.astype(jnp.int32), jnp.asarray(FLAG_WEIGHT, jnp.float32)
    )
    return {
        "flag": mean(flag, valid),
        "vote": mean(vote_distance(primitive.votes.xyz, place), there),
        "center": mean(vote_distance(primitive.center, place), there),
        "size": mean(jnp.sum(jnp.abs(primitive.size - target.size), -1), there),
        "class": mean(cross_entropy(primitive.class_logits, target.label), there),
    }


def matching_terms(
    output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None
) -> dict[str, Float[Array, ""]]:
    """Compares the faces and edges of proposals with primitives and with the boxes that the proposals are assigned to.

    Returns:
      {"match", "class_match", "matched_objectness", "primitive_distance"}: scalars, not weighted.

    Differs: unless config.reference_match_labels is set, a face's primitive is compared with the class of the face's own
      proposal (the reference runs through faces and proposals in two different orders).
    """
    raw, boxes = output.raw, cast(Boxes, scene.boxes)
    mean = partial(masked_mean, axis_name=axis_name)
    candidate = jnp.ones_like(boxes.mask) if config.reference_padding else boxes.mask
    distance, assigned = nearest(
        squared_distances(jax.lax.stop_gradient(raw.clusters.xyz), boxes.center), candidate
    )
    distance = jnp.sqrt(distance + 1e-6)
    valid = raw.clusters.mask & scene.mask[:, None]
    positive = (distance < votenet.NEAR) & valid
    judged = (positive | ((distance > votenet.FAR) & valid))[:, None]
    label = gather_rows(jnp.maximum(boxes.label, 0), assigned)
    size = jnp.where(boxes.mask[..., None], boxes.size, 0.0)
    truth = gather_rows(boxes.center, assigned), gather_rows(size, assigned), gather_rows(boxes.yaw, assigned)

    refinement, primitives = raw.refinement, raw.primitives
    faces = _match(
        face_centers(*truth), refinement.face_centers, [primitives["z"], primitives["xy"]], label, config
    )
    edges = _match(edge_centers(*truth), refinement.edge_centers, [primitives["line"]], label, config)
    matched, class_matched = (jnp.concatenate(pair, 1) for pair in zip(faces, edges, strict=True))
    judged_all = jnp.broadcast_to(judged, matched.shape)
    weight = jnp.asarray(MATCH_WEIGHT, jnp.float32)
    match = cross_entropy(refinement.match_logits, matched.astype(jnp.int32), weight)
    class_match = cross_entropy(refinement.class_match_logits, class_matched.astype(jnp.int32), weight)
    objectness = cross_entropy(
        raw.refined_head.objectness_logits,
        positive.astype(jnp.int32),
        jnp.asarray(votenet.OBJECTNESS_WEIGHT, jnp.float32),
    )

    final = output.predictions  # classes of the initial proposal, numbers of the refined one
    box = final.center, final.size, jax.lax.stop_gradient(final.yaw)
    found = jnp.concatenate([face_centers(*box), edge_centers(*box)], 1)
    wanted = jnp.concatenate([face_centers(*truth), edge_centers(*truth)], 1)
    off = jnp.sqrt(jnp.sum(jnp.square(found - wanted), -1) + 1e-6)
    return {
        "match": mean(match, judged_all),
        "class_match": mean(class_match, judged_all),
        "matched_objectness": mean(objectness, jnp.any(matched, 1) & valid),
        "primitive_distance": mean(off, matched & positive[:, None]),
        "matched_share": mean(matched.astype(jnp.float32), judged_all),
    }


def _match(truth, proposed, primitives: list[PrimitiveOutput], label, config):
    """Which faces (or edges) have a primitive near the true and near the proposed one: bool[B, F, Q], and of their class."""
    batch, count, proposals, _ = truth.shape
    placed = jax.lax.stop_gradient(jnp.concatenate([place_primitives(p) for p in primitives], 1))
    classes = jnp.argmax(jnp.concatenate([p.class_logits for p in primitives], 1), -1)
    mask = jnp.concatenate([p.votes.mask for p in primitives], 1)
    squared, row = nearest(squared_distances(truth.reshape(batch, -1, 3), placed), mask)
    to_truth = jnp.sqrt(squared + 1e-6).reshape(batch, count, proposals)
    row = row.reshape(batch, count, proposals)
    to_proposed = jnp.sqrt(
        jnp.sum(jnp.square(jax.lax.stop_gradient(proposed) - gather_rows(placed, row)), -1) + 1e-6
    )
    matched = (to_truth < MATCH_DISTANCE) & (to_proposed < MATCH_DISTANCE)
    wanted = jnp.broadcast_to(label[:, None], row.shape)
    if config.reference_match_labels:
        wanted = jnp.repeat(label, count, axis=1).reshape(row.shape)
    return matched, matched & (gather_rows(classes, row) == wanted)
