from .first_batch import FirstBatch
from .loss_spikes import SpikeDetector, SpikesConfig
from .measures import effective_rank, gradient_measures
from .noise_scale import NoiseScale
from .observer import Diagnostics, DiagnosticsConfig
from .reach import ReachTable

__all__ = [
    "Diagnostics",
    "DiagnosticsConfig",
    "FirstBatch",
    "NoiseScale",
    "ReachTable",
    "SpikeDetector",
    "SpikesConfig",
    "effective_rank",
    "gradient_measures",
]
