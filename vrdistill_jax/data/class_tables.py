"""Class names, label ids and mean box sizes of the two indoor benchmarks.

Row i of a size table belongs to class i. ScanNet's sizes are extents along x, y and z of axis-aligned boxes;
SUN RGB-D's are along the box axes: x is the direction the object faces (depth), y its width, z its height.

Source: the mean sizes that VoteNet (https://github.com/facebookresearch/votenet) trains with; SUN RGB-D's
  are medians.
"""

import numpy as np

SCANNET_CLASSES = (
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "desk",
    "curtain",
    "refrigerator",
    "shower_curtain",
    "toilet",
    "sink",
    "bathtub",
    "garbage_bin",
)

SCANNET_NYU40_IDS = (
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    14,
    16,
    24,
    28,
    33,
    34,
    36,
    39,
)  # 39 is "other furniture"

SCANNET_MEAN_SIZES = np.array(
    [
        [0.76966726, 0.81160211, 0.92573744],
        [1.876858, 1.84255952, 1.19315654],
        [0.61327999, 0.61486087, 0.71827014],
        [1.39550063, 1.51215451, 0.83443565],
        [0.97949596, 1.06751485, 0.63296875],
        [0.53166301, 0.59555772, 1.75001483],
        [0.96247056, 0.72462326, 1.14818682],
        [0.83221924, 1.04909355, 1.68756634],
        [0.21132214, 0.4206159, 0.53728459],
        [1.44400728, 1.89708334, 0.26985747],
        [1.02942616, 1.40407966, 0.87554322],
        [1.37664116, 0.65521793, 1.68131292],
        [0.66508189, 0.71111926, 1.29885307],
        [0.41999174, 0.37906947, 1.75139715],
        [0.59359559, 0.59124924, 0.73919014],
        [0.50867595, 0.50656087, 0.30136236],
        [1.15115265, 1.0546296, 0.49706794],
        [0.47535286, 0.49249493, 0.58021168],
    ],
    np.float32,
)

SUNRGBD_CLASSES = (
    "bed",
    "table",
    "sofa",
    "chair",
    "toilet",
    "desk",
    "dresser",
    "night_stand",
    "bookshelf",
    "bathtub",
)

SUNRGBD_MEAN_SIZES = np.array(
    [
        [2.114256, 1.620300, 0.927272],
        [0.791118, 1.279516, 0.718182],
        [0.923508, 1.867419, 0.845495],
        [0.591958, 0.552978, 0.827272],
        [0.699104, 0.454178, 0.756250],
        [0.695190, 1.346299, 0.736364],
        [0.528526, 1.002642, 1.172878],
        [0.500618, 0.632163, 0.683424],
        [0.404671, 1.071108, 1.688889],
        [0.765840, 1.398258, 0.472728],
    ],
    np.float32,
)
