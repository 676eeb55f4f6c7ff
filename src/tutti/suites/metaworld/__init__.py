"""Meta-World: its tasks, cameras, rendering, scripted experts and instructions."""
