from .policy import CheckpointPolicyFactory, Policy, export_policy

__all__ = [
    "CheckpointPolicyFactory",
    "Policy",
    "export_policy",
]
