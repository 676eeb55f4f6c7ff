"""Meta-World: tasks, rendering, instructions and the suite that joins them."""
