from .compare_runs import Comparison, compare_checkpoints, compare_records
from .doctor import Diagnosis, examine, print_diagnosis, run_doctor
from .probe import probe_checkpoint
from .replay import Replay, Scope, replay_step
from .replay_command import replay_saved_step
from .verify_resume import Verification, prove_resume

__all__ = [
    "Comparison",
    "Diagnosis",
    "Replay",
    "Scope",
    "Verification",
    "compare_checkpoints",
    "compare_records",
    "examine",
    "print_diagnosis",
    "probe_checkpoint",
    "prove_resume",
    "replay_saved_step",
    "replay_step",
    "run_doctor",
]
