"""Indoor 3D object detection on point clouds in JAX: train, distil and run detectors."""

__version__ = "0.1.0"
