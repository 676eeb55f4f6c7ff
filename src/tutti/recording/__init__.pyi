from .episode_files import RecordedEpisode, load_recorded
from .recorder import RecordConfig, RecordSummary, record

__all__ = ["RecordConfig", "RecordSummary", "RecordedEpisode", "load_recorded", "record"]
