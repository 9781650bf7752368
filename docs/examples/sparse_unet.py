"""Trains a small sparse U-Net to label every point of a room with the class of its object.

    python docs/examples/sparse_unet.py

About a minute on two CPU cores. It uses the sparse convolutions on their own: no detector, no loader, no config file. Rooms are
generated (SynthRooms), so nothing is downloaded.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vrdistill_jax.data.class_tables import SCANNET_CLASSES
from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.synthrooms import generate_scene
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.losses.classification import cross_entropy
from vrdistill_jax.nn.norm import MaskedBatchNorm, update_running
from vrdistill_jax.nn.sparse_conv import SparseConv, SparseConvTransposed, point_features, voxel_features
from vrdistill_jax.structs import VoxelLevelConfig, VoxelPyramidConfig

BACKGROUND = len(
    SCANNET_CLASSES
)  # generated rooms have the classes of ScanNet; this label lies behind the last
BATCH_SIZE = 2
PYRAMID = VoxelPyramidConfig(
    voxel_size=0.08,
    levels=(VoxelLevelConfig(same3=True), *[VoxelLevelConfig(same3=True, down2=True)] * 3),
)


class SparseUNet(nn.Module):
    """Down through the levels of the pyramid and up again, with shortcuts.

    Attributes:
      num_classes: of the points.
      sizes: channels of each level, fine to coarse.
    """

    num_classes: int
    sizes: tuple[int, ...] = (16, 32, 64, 64)

    @nn.compact
    def __call__(self, features, pyramid, *, train):
        """Maps features f32[B, N, F] of the points to logits f32[B, N, num_classes]."""

        def layer(conv, x, kernel_map, mask):
            return jax.nn.relu(MaskedBatchNorm(conv.size)(conv(x, kernel_map), mask, train=train))

        levels, sizes, shortcuts = pyramid.levels, self.sizes, []
        x = voxel_features(features, pyramid, "mean")
        for n, (level, size) in enumerate(zip(levels, sizes, strict=True)):
            if n:
                x = layer(SparseConv(x.shape[-1], size, num_taps=8), x, level.down2, level.mask)
            x = layer(SparseConv(x.shape[-1], size), x, level.same3, level.mask)
            shortcuts.append(x)
        for n in reversed(range(len(sizes) - 1)):
            # Back to the encoder's voxels: the map that led down, read the other way.
            up = SparseConvTransposed(sizes[n + 1], sizes[n], num_taps=8)
            x = shortcuts[n] + layer(up, x, levels[n + 1].down2, levels[n].mask)
            x = layer(SparseConv(sizes[n], sizes[n]), x, levels[n].same3, levels[n].mask)
        return nn.Dense(self.num_classes)(point_features(x, pyramid))


def make_rooms(indices, num_points):
    """(features f32[N, 4], labels i32[N], VoxelPyramid) of some generated rooms; all in NumPy, of different sizes."""
    rooms = []
    for index in indices:
        room = generate_scene(seed=0, index=index)
        rows = np.random.default_rng(index).permutation(len(room["xyz"]))[:num_points]
        xyz, instance = room["xyz"][rows], room["instance"][rows]
        features = np.concatenate([room["color"][rows], xyz[:, 2:]], 1).astype(np.float32)
        labels = np.where(instance >= 0, room["boxes_label"][instance], BACKGROUND).astype(np.int32)
        rooms.append((features, labels, build_voxel_pyramid(xyz, np.ones(len(xyz), bool), PYRAMID)))
    return rooms


def stack_rooms(rooms, capacities):
    """A batch; equal shapes for all batches mean that the step is compiled once."""
    return stack_trees([(x, y, pad_voxel_pyramid(pyramid, capacities, PYRAMID)) for x, y, pyramid in rooms])


def train(num_rooms=60, num_points=6000, size=16, steps=150):
    """Trains on three quarters of the rooms.

    Args:
      num_rooms: rooms in all.
      num_points: points of each room.
      size: channels of the finest level; they double twice on the way down.
      steps: of the optimiser, with BATCH_SIZE rooms each.

    Returns:
      (losses of all steps; shares of the points of the other rooms: that are right, of objects that are right, of
      background).
    """
    rooms = make_rooms(range(num_rooms), num_points)
    sizes = [[len(level.mask) for level in pyramid.levels] for _, _, pyramid in rooms]
    capacities = np.max(sizes, 0)
    seen, unseen = rooms[: 3 * num_rooms // 4], rooms[3 * num_rooms // 4 :]
    print(f"{len(seen)} rooms to learn from, {len(unseen)} held out; voxels per level: up to {capacities}")

    model = SparseUNet(BACKGROUND + 1, (size, 2 * size, 4 * size, 4 * size))
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, steps))
    features, _, pyramid = stack_rooms(seen[:BATCH_SIZE], capacities)
    variables = jax.jit(lambda key: model.init(key, features, pyramid, train=False))(jax.random.key(0))
    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, stats, state, batch):
        def objective(params):
            features, labels, pyramid = batch
            tree = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(tree, features, pyramid, train=True, mutable=["batch_stats"])
            return jnp.mean(cross_entropy(logits, labels)), updates["batch_stats"]

        (loss, written), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), update_running(stats, written, 0.1), state, loss

    losses, rng = [], np.random.default_rng(0)
    for number in range(steps):
        chosen = rng.choice(len(seen), BATCH_SIZE, replace=False)
        batch = stack_rooms([seen[row] for row in chosen], capacities)
        params, stats, state, loss = step(params, stats, state, batch)
        losses.append(float(loss))
        if number % max(steps // 10, 1) == 0:
            print(f"step {number:4d}  loss {losses[-1]:.3f}")

    @jax.jit
    def predict(features, pyramid):
        logits = model.apply({"params": params, "batch_stats": stats}, features, pyramid, train=False)
        return jnp.argmax(logits, -1)

    right, labels = [], []
    for room in unseen:
        features, truth, pyramid = stack_rooms([room], capacities)
        right.append(np.asarray(predict(features, pyramid)) == truth)
        labels.append(truth)
    right, is_object = np.concatenate(right, axis=None), np.concatenate(labels, axis=None) != BACKGROUND
    return losses, float(np.mean(right)), float(np.mean(right[is_object])), float(np.mean(~is_object))


def main():
    """Trains and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("num_rooms", 60), ("num_points", 6000), ("size", 16), ("steps", 150)):
        parser.add_argument(f"--{name}", type=int, default=default)
    losses, accuracy, of_objects, background = train(**vars(parser.parse_args()))
    print(f"loss: {losses[0]:.3f} at the first step, {np.mean(losses[-10:]):.3f} over the last ones")
    print(f"held-out rooms: {accuracy:.1%} of the points right, {of_objects:.1%} of those of objects")
    print(f"for comparison: {background:.1%} of the points are background")


if __name__ == "__main__":
    main()
