"""The same submanifold convolution by spconv, with our kernel."""

from collections.abc import Callable

import numpy as np

Convolution = Callable[[], np.ndarray]


def make_convolution(
    coords: np.ndarray, features: np.ndarray, kernel: np.ndarray
) -> tuple[Convolution, Convolution]:
    """Prepares a 3^3 convolution of one scene on the CPU.

    Args:
      coords: i32[v, 3] voxels.
      features: f32[v, C].
      kernel: f32[27, C, D], x fastest over the taps.

    Returns:
      (with its kernel map built anew, with the map kept); each returns f32[v, D] in the order of `coords`.

    Raises:
      ImportError: with how to install it, if spconv or torch is not installed.
    """
    try:
        import spconv.pytorch as spconv
        import torch
    except ImportError as error:
        raise ImportError("not installed: pip install torch spconv") from error
    # One thread: with two, spconv 2.3.8's CPU build gave other results from call to call.
    torch.set_num_threads(1)
    _, channels, size = kernel.shape
    shifted = coords - coords.min(0)
    index = torch.from_numpy(np.pad(shifted, [(0, 0), (1, 0)]).astype(np.int32))
    values = torch.from_numpy(np.array(features))
    shape = [int(n) + 1 for n in shifted.max(0)]

    def convolution(key: str | None):
        layer = spconv.SubMConv3d(channels, size, 3, bias=False, indice_key=key)
        taps = kernel.reshape(3, 3, 3, channels, size)  # z, y, x; spconv's axes are those of the coordinates
        weight = np.ascontiguousarray(taps.transpose(4, 2, 1, 0, 3))
        layer.weight.data = torch.from_numpy(weight)
        return layer.eval()

    fresh, cached = convolution(None), convolution("map")
    kept = spconv.SparseConvTensor(values, index, shape, 1)

    @torch.no_grad()
    def map_and_product() -> np.ndarray:
        return fresh(spconv.SparseConvTensor(values, index, shape, 1)).features.numpy()

    @torch.no_grad()
    def only_product() -> np.ndarray:
        return cached(kept).features.numpy()

    return map_and_product, only_product
