"""What codecs need to know of a model beforehand, computed from its activations on a text, and kept in a file."""

from kvcomp_jax.calibrate.layer import Activations, Calibrate
from kvcomp_jax.calibrate.levels import nearest_levels, restore_moments, weighted_kmeans
from kvcomp_jax.calibrate.store import About, NotCalibrated, file_name, find, load, locate, save

__all__ = [
    "About",
    "Activations",
    "Calibrate",
    "NotCalibrated",
    "file_name",
    "find",
    "load",
    "locate",
    "nearest_levels",
    "restore_moments",
    "save",
    "weighted_kmeans",
]
