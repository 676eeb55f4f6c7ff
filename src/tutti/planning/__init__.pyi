from .devices import DEVICES, Device, find_device
from .footprint import TrialUpdate, count_flops, fake_update
from .plan import Plan, Request, make_plan, plan_run
from .report import print_plan

__all__ = [
    "DEVICES",
    "Device",
    "Plan",
    "Request",
    "TrialUpdate",
    "count_flops",
    "fake_update",
    "find_device",
    "make_plan",
    "plan_run",
    "print_plan",
]
