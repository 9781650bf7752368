"""The comparison with H3DNet on SUN RGB-D: turned boxes, both settings of the primitives."""

import numpy as np
from drawn_outputs import LEVELS, camera, channels_first, draw_output, names, softmax

from vrdistill_jax.interop import parity_h3dnet
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.torch_h3dnet import h3dnet_config


def test_h3dnet_with_turned_boxes():
    drawn = draw_output(
        h3dnet_config("sunrgbd"), width=1 / 8, num_proposals=16, levels=LEVELS, num_towers=2, aggregation_neighbors=8,
        match_neighbors=8,
    )  # fmt: skip
    config, raw, mean = drawn.config, drawn.output.raw, np.asarray(drawn.config.detector.mean_sizes)
    far = {
        kind: p._replace(center=p.center + 20.0) for kind, p in raw.primitives.items()
    }  # at no face's radius
    small = {
        name: raw._asdict()[name]._replace(size_residual=0.1 * raw._asdict()[name].size_residual)
        for name in ("head", "refined_head")
    }
    raw = raw._replace(primitives=far, **small)
    drawn.output = drawn.output._replace(raw=raw)
    stored, refinement = {"aggregated_vote_inds": raw.cluster_index}, raw.refinement
    for name, values in (
        ("surface_center_object", refinement.face_centers),
        ("line_center_object", refinement.edge_centers),
        ("match_scores", refinement.match_logits),
        ("match_scores_sem", refinement.class_match_logits),
    ):
        stored[name] = values.reshape(2, -1, values.shape[-1])
    stored["match_surface_features"] = channels_first(refinement.face_features.reshape(2, 6 * 16, -1))
    stored["match_line_features"] = channels_first(refinement.edge_features.reshape(2, 12 * 16, -1))
    stored["conv_refine4_raw"] = channels_first(refinement.channels)
    for mode, head in (("center", raw.head), ("opt", raw.refined_head)):
        stored |= {
            f"aggregated_vote_xyz{mode}": raw.clusters.xyz,
            f"objectness_scores{mode}": head.objectness_logits,
            f"center{mode}": head.center,
            f"heading_scores{mode}": head.heading_logits,
            f"heading_residuals_normalized{mode}": head.heading_residual,
            f"heading_residuals{mode}": head.heading_residual * np.pi / 12,
            f"size_scores{mode}": head.size_logits,
            f"size_residuals_normalized{mode}": head.size_residual,
            f"size_residuals{mode}": head.size_residual * mean,
            # the reference reads the refined classes off the size scores
            f"sem_cls_scores{mode}": head.size_logits if mode == "opt" else head.class_logits,
        }
    table = ParityTable()
    flips = parity_h3dnet.find_flips(stored, raw, config.detector)
    assert not flips.proposals.any()
    parity_h3dnet.check_refinement(table, stored, drawn.output, config, flips, "with_angle_false:")
    assert table.ok, table.render()
    assert {f"with_angle_false:{name}" for name in stored} <= names(table)

    # Boxes of the four settings: class of heading and size of the first stage, numbers of the second.
    options, parsed = {"nms_iou": 0.25, "cls_nms": True, "conf_thresh": 0.05}, {}
    for angle in (0, 1):
        for classes in (0, 1):
            residual = (raw.refined_head if angle else raw.head).heading_residual
            bins, sizes = raw.head.heading_logits.argmax(-1), raw.head.size_logits.argmax(-1)
            heading = (
                bins * 2 * np.pi / 12 + np.take_along_axis(residual, bins[..., None], -1)[..., 0] * np.pi / 12
            )
            share = np.take_along_axis(raw.refined_head.size_residual, sizes[..., None, None], -2)[..., 0, :]
            size = mean[sizes] * (1 + share)
            boxes = np.concatenate([raw.refined_head.center, size, -heading[..., None]], -1).astype(
                np.float32
            )
            logits = raw.refined_head.size_logits if classes else raw.head.class_logits
            objectness = softmax(raw.refined_head.objectness_logits)[..., 1]
            name = f"parse_optang{angle}_optsem{classes}"
            kept = [
                np.asarray(parity_h3dnet.nms(b, o, np.ones(16, bool), c, threshold=0.25).mask)
                for b, o, c in zip(boxes, objectness, logits.argmax(-1), strict=True)
            ]
            parsed[f"{name}_pred_mask"] = np.stack(kept)
            for b in range(2):
                rows = np.flatnonzero(kept[b] & (objectness[b] > 0.05))
                parsed[f"{name}_score_{b}"] = (objectness[b][rows] * softmax(logits[b])[rows].T).reshape(-1)
                parsed[f"{name}_corners_{b}"] = camera(boxes[b])[rows]
    table = ParityTable()
    parity_h3dnet.check_parsing(table, parsed, drawn.output, config, flips, options)
    assert table.ok, table.render()
    assert names(table) == set(parsed)


def test_only_neighbours_at_the_radius_excuse_a_difference():
    drawn = draw_output(
        h3dnet_config("sunrgbd"), width=1 / 8, num_proposals=16, levels=LEVELS, num_towers=2, aggregation_neighbors=8,
        match_neighbors=8,
    )  # fmt: skip
    config, raw = drawn.config.detector, drawn.output.raw
    primitives = {}
    for kind, primitive in raw.primitives.items():
        votes = np.zeros_like(primitive.votes.xyz)
        votes[..., 0] = 10.0 * np.arange(votes.shape[1])  # nobody's neighbours
        present = np.zeros_like(primitive.flag_logits)
        present[..., 1] = 10.0
        primitives[kind] = primitive._replace(
            votes=primitive.votes._replace(xyz=votes), center=primitive.center + 1000.0, flag_logits=present
        )
    raw = raw._replace(primitives=primitives)
    refinement, z, line = raw.refinement, primitives["z"], primitives["line"]
    # Two votes are neighbours or not; what they give lies inside one face's ball. One edge has a line at its radius.
    z.votes.xyz[0, 1] = z.votes.xyz[0, 0] + np.float32([config.aggregation_radius + 5e-6, 0, 0])
    z.center[0, 0] = refinement.face_centers[0, 2, 3] + np.float32([0.1, 0, 0])
    line.center[1, 5] = refinement.edge_centers[1, 1, 4] + np.float32([0, config.match_radius - 2e-5, 0])
    logits = {name: np.array(getattr(refinement, name)) for name in ("match_logits", "class_match_logits")}
    golden = {
        "center_z": np.array(z.center),
        "center_xy": np.array(primitives["xy"].center),
        "conv3_raw": channels_first(raw.head_channels),
    }
    golden["center_z"][0, [0, 7]] += 1.0
    golden["center_xy"][0, 0] += 1.0
    logits["match_logits"][0, 2, 3] += 1.0
    logits["match_logits"][0, 1, 3] += 1.0
    logits["class_match_logits"][1, 7, 4] += 1.0
    golden["match_scores"] = logits["match_logits"].reshape(2, 18 * 16, -1)
    golden["match_scores_sem"] = logits["class_match_logits"].reshape(2, 18 * 16, -1)
    flips = parity_h3dnet.find_flips(golden, raw, config)
    assert np.argwhere(flips.votes["z"]).tolist() == [[0, 0]]
    assert not flips.votes["xy"].any()
    assert not flips.clusters.any()
    assert np.argwhere(flips.sides).tolist() == [[0, 2, 3], [1, 7, 4]]
    assert np.argwhere(flips.proposals).tolist() == [[0, 3], [1, 4]]

    # Of a file that does not hold the primitives, those of another one count.
    rest = {name: golden[name] for name in ("match_scores", "match_scores_sem")}
    again = parity_h3dnet.find_flips(rest, raw, config, flips.votes)
    np.testing.assert_array_equal(again.sides, flips.sides)
    assert not parity_h3dnet.find_flips(rest, raw, config).sides[0].any()

    table = ParityTable()
    parity_h3dnet.check_forward(table, golden | other_outputs(raw), drawn.output._replace(raw=raw), flips)
    # Row 7 of the one has no excuse, nor has any of the other.
    assert set(table.failed) == {"center_z", "center_xy"}
    golden["center_z"][0, 7] -= 1.0
    golden["center_xy"][0, 0] -= 1.0
    table = ParityTable()
    parity_h3dnet.check_forward(table, golden | other_outputs(raw), drawn.output._replace(raw=raw), flips)
    assert table.ok, table.render()
    every = flips._replace(votes={kind: np.ones_like(rows) for kind, rows in flips.votes.items()})
    table = ParityTable()
    parity_h3dnet.check_forward(table, golden | other_outputs(raw), drawn.output._replace(raw=raw), every)
    assert "flipped_votes_z" in table.failed


def other_outputs(raw):
    """What the comparison of the forward pass cannot do without."""
    return {"seed_inds": raw.seeds.seed_index, "seed_xyz": raw.seeds.xyz}
