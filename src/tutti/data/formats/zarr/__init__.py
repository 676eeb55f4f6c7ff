"""Zarr replay buffers: diffusion policy's and UMI's data/ and meta/episode_ends."""
