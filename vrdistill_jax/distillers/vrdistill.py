"""VRDistill: the student learns from refined teacher votes, weighted by how near they are to an object.

The teacher's votes pass a refinement module (attention among near votes), trained together with the student to move them to
object centres. Each student vote imitates the features of the nearest refined teacher vote; votes far from every object
count less.

Source: "VRDistill: Vote Refinement Distillation for Efficient Indoor 3D Object Detection" (2024), equations 1 to 6. No code
was released. The text leaves much open (what a vote is, the start of the refinement, several weights); each reading is an
entry of `default_config` and docs/distillation.md says why it was chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vrdistill_jax.distillers.matching import align_features, find_nearest, gather_points
from vrdistill_jax.distillers.regions import points_inside_boxes
from vrdistill_jax.distillers.vote_refinement import VoteRefinement, safe_sqrt
from vrdistill_jax.geometry.boxes import join_boxes, points_in_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.losses.votes import vote_targets
from vrdistill_jax.structs import Boxes, DetectorOutput, PointSet, Scene

VOTE_LEVELS = ("cluster", "sampled_vote", "vote")


def default_config() -> ConfigDict:
    """The method's entry of config.distiller.methods.

    Entries:
      weight: of the whole method beside the detection loss.
      eta: weight of the vote consistency loss L_dis (equation 5).
      mu: weight of the refinement loss L_ref (equation 6).
      vote_level: what a vote is: "cluster" (sampled votes with the features of their group), "sampled_vote" (the votes at
        the cluster centres) or "vote" (all of them).
      same_clusters: groups the student's votes, in a second pass of its grouping, at the seeds that the teacher's clusters
        go back to, so that a student vote has a partner near by. False as printed: each samples its own clusters, and the
        nearest vote of the teacher may belong to another object. Needs vote_level "cluster" and one kind of detector.
      refine: False takes the teacher's votes as they are; L_ref is then absent.
      layers: L of the refinement; 0 is the same as refine=False.
      heads: H of its attention.
      neighbors: K, how many nearest votes (itself included) a vote attends to.
      bias_sign: sign of the distance in the attention: +1 as printed (of the K nearest, farther ones weigh a little more),
        0 none, -1 nearer ones weigh more.
      ffn_ratio: hidden channels of the feed-forward layers per channel.
      cross_query: which votes ask in the cross-attention, "refined" or "initial"; the others are keys and values.
      mask: "soft" (equation 3), "hard" (1 inside a box, 0 outside) or "off" (1).
      sigma: of the soft mask.
      normalize_mask: multiplies the soft mask by sigma, so that it is 1 at a centre whatever sigma is.
      rotate_mask: measures offsets in the axes of turned boxes.
      ref_target: where refined votes should be: "box_center" or "vote_center" (the detector's own target).
      reduction: "mean" over votes and channels, or the printed "sum" (and the mean over scenes).
      coordinate_weight: weight, within L_dis, of ||x_s - x_t||^2 times the mask (0: features only, as printed).
      dis_detach_target: whether L_dis trains the student only; False as printed, it trains the refinement as well.
      target_features: what the student's features imitate: the "initial" ones, the teacher's own, of the votes that were
        refined, whose refined positions decide matches and mask; or, as printed, those of the "refined" votes, on which
        student and refinement agree by making them constant (docs/distillation.md).
      head_weight: weight of the detection loss of the teacher's own head on the refined votes. It trains the refinement only,
        and keeps refined features readable for that head.
      stop_mask_gradient: False lets L_dis move refined votes through the mask (away from the objects).
      stop_bias_gradient: False lets it move them through the distances in the attention.
    """
    return ConfigDict(
        dict(
            weight=1.0,
            eta=30.0,
            mu=10.0,
            vote_level="cluster",
            same_clusters=False,
            refine=True,
            layers=4,
            heads=4,
            neighbors=5,
            bias_sign=1,
            ffn_ratio=2,
            cross_query="refined",
            mask="soft",
            sigma=1.0,
            normalize_mask=False,
            rotate_mask=True,
            ref_target="box_center",
            reduction="mean",
            coordinate_weight=0.0,
            dis_detach_target=False,
            target_features="initial",
            head_weight=0.0,
            stop_mask_gradient=True,
            stop_bias_gradient=True,
        )
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> "VRDistill":
    """The distiller that an entry of config.distiller.methods describes; the sizes come from the networks' outputs.

    Raises:
      ValueError: for an entry out of range.
    """
    del student, teacher
    _check_choice(config, "vote_level", VOTE_LEVELS)
    _check_choice(config, "mask", ("soft", "hard", "off"))
    _check_choice(config, "bias_sign", (-1, 0, 1))
    _check_choice(config, "cross_query", ("refined", "initial"))
    _check_choice(config, "ref_target", ("box_center", "vote_center"))
    _check_choice(config, "reduction", ("mean", "sum"))
    _check_choice(config, "target_features", ("refined", "initial"))
    if not config.sigma > 0:
        raise ValueError(f"vrdistill.sigma is {config.sigma}; expected > 0 (the paper uses 1)")
    if config.head_weight and config.vote_level != "cluster":
        raise ValueError(
            f"vrdistill.head_weight is {config.head_weight}, but the teacher's head reads clusters and vrdistill.vote_level is "
            f"{config.vote_level}; set head_weight to 0 or vote_level to cluster"
        )
    if config.same_clusters and config.vote_level != "cluster":
        raise ValueError(
            f"vrdistill.same_clusters is True, but vrdistill.vote_level is {config.vote_level} and reads no clusters; set one "
            "of them to its default"
        )
    if config.neighbors < 1 or config.layers < 0:
        raise ValueError(
            f"vrdistill.neighbors is {config.neighbors} and layers {config.layers}; expected at least 1 and 0"
        )
    return VRDistill(**{name: config[name] for name in default_config()}, axis_name=axis_name)


def _check_choice(config: Any, name: str, choices: tuple) -> None:
    if config[name] not in choices:
        raise ValueError(
            f"vrdistill.{name} is {config[name]!r}; expected one of {', '.join(map(str, choices))}"
        )


class VRDistill(nn.Module):
    """The losses and their learnable parts: `align` (student to teacher channels) and `refinement`.

    The attributes are the entries of `default_config`, and
      axis_name: mapped device axis over which means are taken, or None.
    """

    weight: float = 1.0
    eta: float = 30.0
    mu: float = 10.0
    vote_level: str = "cluster"
    same_clusters: bool = False
    refine: bool = True
    layers: int = 4
    heads: int = 4
    neighbors: int = 5
    bias_sign: int = 1
    ffn_ratio: int = 2
    cross_query: str = "refined"
    mask: str = "soft"
    sigma: float = 1.0
    normalize_mask: bool = False
    rotate_mask: bool = True
    ref_target: str = "box_center"
    reduction: str = "mean"
    coordinate_weight: float = 0.0
    dis_detach_target: bool = False
    target_features: str = "initial"
    head_weight: float = 0.0
    stop_mask_gradient: bool = True
    stop_bias_gradient: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        scene: Scene,
        *,
        aligned: DetectorOutput | None = None,
        judge: Callable[[PointSet], Array] | None = None,
        train: bool = True,
    ) -> tuple[Array, dict[str, Array]]:
        """The distillation loss.

        Args:
          student: of the student on the same clouds as
          teacher: of the teacher.
          scene: with boxes and, where votes go back to points of the cloud, point_instance.
          aligned: of the student at the teacher's clusters; read with same_clusters.
          judge: (votes) -> detection loss of the teacher's head on them; None leaves it out.
          train: not used.

        Returns:
          (weight (eta L_dis + mu L_ref + head_weight L_head), terms). Terms: "dis", "ref", "head" and "coordinate" losses;
          "sum", equation 5 as printed; "ref_start", what L_ref would be of the teacher's own votes; "mask", its mean; "match",
          the mean distance to the matched vote in metres; "spread", the variance of the refined features over that of the
          teacher's (towards 0 the refinement collapses).

        Raises:
          ValueError: if the scene has no labels.
        """
        del train
        if scene.boxes is None:
            raise ValueError("VRDistill needs scene.boxes; this scene has no labels")
        teacher_votes = jax.lax.stop_gradient(select_votes(teacher, self.vote_level))
        if self.same_clusters:
            if aligned is None:
                raise ValueError(
                    "vrdistill.same_clusters needs the student's output at the teacher's clusters"
                )
            student = aligned
        student_votes = select_votes(student, self.vote_level)
        aligned_features = align_features(student_votes.features, teacher_votes.features.shape[-1])
        student_votes = student_votes._replace(features=aligned_features)
        refined = self._refine(teacher_votes)

        mask = foreground_mask(
            refined.xyz, scene.boxes, self.mask, self.sigma, self.normalize_mask, self.rotate_mask
        )
        mask = jax.lax.stop_gradient(mask) if self.stop_mask_gradient else mask
        target = (
            refined
            if self.target_features == "refined"
            else refined._replace(features=teacher_votes.features)
        )
        target = jax.lax.stop_gradient(target) if self.dis_detach_target else target
        squared, index = find_nearest(student_votes.xyz, target.xyz, target.mask)
        matched, matched_mask = gather_points(target, index), gather_rows(mask, index)
        # A scene in which the teacher has no votes at all matches nothing.
        valid = student_votes.mask & matched.mask & scene.mask[:, None]

        mean = partial(masked_mean, axis_name=self.axis_name)
        error = jnp.sum(jnp.square(student_votes.features - matched.features), -1) * matched_mask
        offset = (
            jnp.sum(jnp.square(student_votes.xyz - jax.lax.stop_gradient(matched.xyz)), -1) * matched_mask
        )
        per_scene = jnp.sum(jnp.where(valid, error, 0.0), -1)
        dis_sum = mean(per_scene, scene.mask)
        if self.reduction == "sum":
            dis, coordinate = dis_sum, mean(jnp.sum(jnp.where(valid, offset, 0.0), -1), scene.mask)
        else:
            dis, coordinate = mean(error, valid) / refined.features.shape[-1], mean(offset, valid)
        total = self.eta * (dis + self.coordinate_weight * coordinate)

        real = teacher_votes.mask & scene.mask[:, None]
        terms = {
            "dis": dis,
            "sum": dis_sum,
            "coordinate": coordinate,
            "mask": mean(mask, real),
            "match": mean(jnp.sqrt(squared), valid),
        }
        if self.refines:
            ref_loss = partial(
                refinement_loss,
                scene=scene,
                target=self.ref_target,
                axis_name=self.axis_name,
                seed_xyz=teacher_votes.xyz,
            )
            ref = ref_loss(refined)
            total = total + self.mu * ref
            spread = _variance(refined.features, real) / (_variance(teacher_votes.features, real) + 1e-12)
            if judge is not None:
                terms["head"] = judge(refined)
                total = total + self.head_weight * terms["head"]
            terms |= {"ref": ref, "ref_start": ref_loss(teacher_votes), "spread": spread}
        # Everything but the total is for the log.
        return self.weight * total, jax.lax.stop_gradient(terms)

    @property
    def needs_judge(self) -> bool:
        """Whether the losses include the teacher's head on refined votes."""
        return self.refines and self.head_weight > 0

    @property
    def needs_aligned(self) -> bool:
        """Whether the student is read at the teacher's clusters."""
        return self.same_clusters

    @property
    def refines(self) -> bool:
        """Whether there is a refinement at all."""
        return self.refine and self.layers > 0

    def _refine(self, votes: PointSet) -> PointSet:
        return (
            self.make_refinement(votes.features.shape[-1], name="refinement")(votes)
            if self.refines
            else votes
        )

    def make_refinement(self, size: int, name: str | None = None) -> VoteRefinement:
        """The refinement of votes with `size` channels."""
        return VoteRefinement(
            size=size,
            layers=self.layers,
            heads=self.heads,
            neighbors=self.neighbors,
            bias_sign=self.bias_sign,
            ffn_ratio=self.ffn_ratio,
            cross_query=self.cross_query,
            stop_bias_gradient=self.stop_bias_gradient,
            name=name,
            parent=self if name else None,
        )


def refine_votes(module: VRDistill, params: dict, output: DetectorOutput) -> tuple[PointSet, PointSet]:
    """The votes of a detector before and after a trained refinement.

    Args:
      module: as `build` makes it.
      params: its trained parameters.
      output: of the teacher that it was trained with.

    Returns:
      (votes, refined votes).
    """
    votes = select_votes(output, module.vote_level)
    if not module.refines:
        return votes, votes
    refinement = module.clone(parent=None).make_refinement(votes.features.shape[-1])
    refined: Any = refinement.apply({"params": params["refinement"]}, votes)
    return votes, refined


def foreground_mask(
    xyz: Float[Array, "b m 3"],
    boxes: Boxes,
    kind: str = "soft",
    sigma: float = 1.0,
    normalize: bool = False,
    rotate: bool = True,
) -> Float[Array, "b m"]:
    """How much each vote counts.

    Args:
      xyz: f32[B, M, 3] metres.
      boxes: ground truth.
      kind: "soft": 1 / (||(x - g) / s||^2 + sigma) with the centre g and full size s of the box whose centre is nearest,
        0 in a scene without boxes; "hard": 1 inside any box, else 0; "off": 1.
      sigma: positive; the largest weight is 1 / sigma.
      normalize: multiplies the soft weight by sigma: the largest is then 1.
      rotate: measures the offset in the box's own axes.

    Returns:
      f32[B, M].

    Source: VRDistill, equation 3.
    Differs: the paper does not say how turned boxes are measured; see `rotate`.
    """
    if kind == "off":
        return jnp.ones(xyz.shape[:-1], xyz.dtype)
    if kind == "hard":
        rows = join_boxes(boxes.center, boxes.size, boxes.yaw)
        inside = jax.vmap(points_in_boxes)(xyz, rows) & boxes.mask[:, None]
        return jnp.any(inside, -1).astype(xyz.dtype)
    _, index = nearest(squared_distances(jax.lax.stop_gradient(xyz), boxes.center), boxes.mask)
    offset = xyz - gather_rows(boxes.center, index)
    if rotate:
        offset = _turn(offset, -gather_rows(boxes.yaw, index))
    weight = 1.0 / (jnp.sum(jnp.square(offset / gather_rows(boxes.size, index)), -1) + sigma)
    weight = weight * sigma if normalize else weight
    return jnp.where(jnp.any(boxes.mask, -1, keepdims=True), weight, 0.0)


def refinement_loss(
    votes: PointSet,
    scene: Scene,
    target: str = "box_center",
    axis_name: str | None = None,
    seed_xyz: Float[Array, "b m 3"] | None = None,
) -> Float[Array, ""]:
    """Mean distance (metres) from the votes of seeds on objects to the centre of their object.

    Args:
      votes: refined votes.
      scene: with boxes and, for votes that go back to points of the cloud, point_instance. A seed in several boxes has the
        nearest of their centres.
      target: "box_center" or "vote_center".
      axis_name: mapped device axis, or None.
      seed_xyz: f32[B, M, 3] where votes without a seed (voxels) started: they are on the objects whose boxes hold that place.
        None: where they are.

    Returns:
      Scalar, 0 without any seed on an object.

    Source: VRDistill, equation 6.
    """
    distance, on_object = center_distances(votes, scene, target, seed_xyz)
    return masked_mean(distance, on_object, axis_name=axis_name)


def center_distances(
    votes: PointSet,
    scene: Scene,
    target: str = "box_center",
    seed_xyz: Float[Array, "b m 3"] | None = None,
) -> tuple[Float[Array, "b m"], Bool[Array, "b m"]]:
    """How far each vote is from the centre of its seed's object; arguments as in `refinement_loss`.

    Returns:
      (f32[B, M] metres, bool[B, M] whether the vote is valid and its seed on an object).
    """
    no_labels = "the refinement loss needs scene.boxes and scene.point_instance; this scene has no labels"
    if scene.boxes is None:
        raise ValueError(no_labels)
    centers = scene.boxes.center if target == "box_center" else scene.boxes.vote_center
    if votes.seed_index is None:
        inside = points_inside_boxes(votes.xyz if seed_xyz is None else seed_xyz, votes.mask, scene.boxes)
        squared = jnp.where(inside, squared_distances(votes.xyz, centers), jnp.inf)
        on_object = jnp.any(inside, -1)
        squared = jnp.where(on_object, jnp.min(squared, -1, initial=jnp.inf), 0.0)
    else:
        if scene.point_instance is None:
            raise ValueError(no_labels)
        targets, on_object = vote_targets(scene.point_instance, centers, votes.seed_index)
        squared = jnp.min(jnp.sum(jnp.square(votes.xyz[:, :, None] - targets), -1), -1)
    return safe_sqrt(squared), on_object & votes.mask & scene.mask[:, None]


def select_votes(output: DetectorOutput, vote_level: str) -> PointSet:
    """The points that VRDistill calls votes.

    Args:
      output: of a detector with the taps "clusters" and "votes".
      vote_level: one of VOTE_LEVELS.

    Raises:
      ValueError: if the detector has no such points.
    """
    tap = "clusters" if vote_level == "cluster" else "votes"
    if tap not in output.taps:
        raise ValueError(
            f"vrdistill.vote_level={vote_level} reads the tap {tap!r}; this detector has {', '.join(output.taps)}"
        )
    if vote_level != "sampled_vote":
        return output.taps[tap]
    if not hasattr(output.raw, "cluster_index"):
        raise ValueError("vrdistill.vote_level=sampled_vote needs a detector that samples votes")
    return gather_points(output.taps[tap], output.raw.cluster_index)


def _turn(offset: Float[Array, "*n 3"], angle: Float[Array, "*n"]) -> Float[Array, "*n 3"]:
    """Rotates about +z, counter-clockwise."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y, z = offset[..., 0], offset[..., 1], offset[..., 2]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def _variance(features: Float[Array, "b m c"], mask: Bool[Array, "b m"]) -> Float[Array, ""]:
    """Variance over the valid rows of this device's scenes, averaged over channels."""
    average = jax.vmap(lambda column: masked_mean(column, mask), in_axes=-1)(features)
    return masked_mean(jnp.mean(jnp.square(features - average), -1), mask)
