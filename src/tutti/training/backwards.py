"""The union of all ways to go backward: what `backward` may be in a config, told apart by `kind`."""

from __future__ import annotations

from tutti.training.backward import OneBackwardConfig

BackwardConfig = OneBackwardConfig
