from .closed_loop.controls import Verdict
from .closed_loop.evaluate import evaluate
from .closed_loop.results import EvaluationResult, Score, TaskScore
from .closed_loop.rollouts import PolicyFactory, Rollout, RolloutPolicy
from .closed_loop.starts import TrainingStarts
from .closed_loop.videos import rollout_videos
from .config import ControlsConfig, EvaluationConfig
from .open_loop import OpenLoopResult, measure_open_loop
from .probes.occlusion import draw_maps
from .probes.run import ProbeResult, run_probes

__all__ = [
    "ControlsConfig",
    "EvaluationConfig",
    "EvaluationResult",
    "OpenLoopResult",
    "PolicyFactory",
    "ProbeResult",
    "Rollout",
    "RolloutPolicy",
    "Score",
    "TaskScore",
    "TrainingStarts",
    "Verdict",
    "draw_maps",
    "evaluate",
    "measure_open_loop",
    "rollout_videos",
    "run_probes",
]
