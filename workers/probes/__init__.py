"""What a Vision Transformer learned, as arrays: filters, positions, where and how sharply its heads look."""

from workers.probes.attention import measure_attention
from workers.probes.filters import patch_filters
from workers.probes.images import first_images
from workers.probes.positions import position_similarity
from workers.probes.probe import probe
from workers.probes.result import Probes, uniform_distance

__all__ = [
    "Probes",
    "first_images",
    "measure_attention",
    "patch_filters",
    "position_similarity",
    "probe",
    "uniform_distance",
]
