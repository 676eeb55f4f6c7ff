from .run_config import RunConfig, load_config

__all__ = ["RunConfig", "load_config"]
