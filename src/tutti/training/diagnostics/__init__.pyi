from .first_batch import FirstBatch
from .loss_spikes import SpikeDetector, SpikesConfig
from .measures import gradient_measures
from .noise_scale import NoiseScale
from .observer import DiagnosticsConfig, DiagnosticsObserver
from .reach import ReachTable

__all__ = [
    "DiagnosticsConfig",
    "DiagnosticsObserver",
    "FirstBatch",
    "NoiseScale",
    "ReachTable",
    "SpikeDetector",
    "SpikesConfig",
    "gradient_measures",
]
