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
    parity_h3dnet.check_refinement(table, stored, drawn.output, config, "with_angle_false:")
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
    parity_h3dnet.check_parsing(table, parsed, drawn.output, config, options)
    assert table.ok, table.render()
    assert names(table) == set(parsed)
