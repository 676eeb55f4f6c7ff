"""One file a storage format; each gives an `EpisodeStore`."""
