"""Charts as SVG: axes, lines, matrices, forest plots."""
