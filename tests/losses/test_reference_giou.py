import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.geometry.boxes import corners_from_boxes
from vrdistill_jax.geometry.frames import boxes_from_votenet, camera_from_depth
from vrdistill_jax.geometry.iou import pairwise_giou
from vrdistill_jax.losses.reference_giou import pairwise_reference_giou

reference_giou = jax.jit(pairwise_reference_giou, static_argnums=2)
right_giou = jax.jit(pairwise_giou)
WIDE = [0.0, 0.0, 0.0, 1.0, 2.0, 1.0]


def boxes(*yaws):
    return jnp.asarray([[*WIDE, yaw] for yaw in yaws])


def test_small_turns_are_right_and_large_ones_are_not():
    small, large = boxes(0.0, 0.3), boxes(1.2, 2.0)
    right = right_giou(small, small)
    np.testing.assert_allclose(reference_giou(small, small, "torch"), right, atol=1e-6)
    self_overlap = np.diag(reference_giou(large, large, "torch"))
    np.testing.assert_allclose(self_overlap, [0.084, 0.028], atol=1e-3)  # a box with itself
    np.testing.assert_allclose(right_giou(large, large)[0, 0], 0.542, atol=1e-3)


def test_cython_lets_four_boxes_overlap():
    seven = boxes(*[0.3] * 7)
    giou = np.asarray(reference_giou(seven, seven, "cython"))
    np.testing.assert_allclose(giou[:, :4], np.asarray(right_giou(seven, seven))[:, :4], atol=1e-6)
    assert (giou[:, 4:] < giou[0, 0] - 0.3).all()


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="'numpy' is unknown; there are: torch, cython"):
        reference_giou(boxes(0.0), boxes(0.0), "numpy")


def reference_boxes(golden, kind, which):
    parts = (golden[f"{kind}_{which}_center"], golden[f"{kind}_{which}_size"])
    return boxes_from_votenet(
        np.concatenate([*parts, golden[f"{kind}_{which}_angle"][..., None]], -1), "full"
    )


@pytest.mark.data
@pytest.mark.parametrize("kind", ["full", "small", "none"])
def test_against_the_official_numbers(shared, kind):
    golden = np.load(shared / "golden/giou/giou_3detr.npz")
    a, b = (reference_boxes(golden, kind, which) for which in "ab")
    valid = np.arange(b.shape[1]) < golden[f"{kind}_nums_k2"][:, None, None]
    valid = np.broadcast_to(valid, (*a.shape[:2], b.shape[1]))
    for variant, name in (("torch", "torchscript"), ("cython", "cython")):
        ours = np.asarray(reference_giou(a, b, variant))
        np.testing.assert_allclose(ours[valid], golden[f"{kind}_giou_{name}"][valid], atol=2e-5)
    if kind != "none":
        return

    def total(a):
        return jnp.sum(jnp.where(valid, pairwise_giou(a, b, rotated=False), 0.0))

    # The reference's gradient by corners, taken back to centre and size by our corners.
    _, back = jax.vjp(lambda rows: camera_from_depth(corners_from_boxes(rows)), jnp.asarray(a))
    expected = back(jnp.asarray(golden["none_grad_sum_giou_wrt_corners_a"]))[0][..., :6]
    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.asarray(a))[..., :6], expected, atol=2e-4)
