from .export import export_policy
from .policy import CheckpointPolicyFactory, Policy

__all__ = [
    "CheckpointPolicyFactory",
    "Policy",
    "export_policy",
]
