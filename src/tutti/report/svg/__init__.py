"""Charts as SVG: axes, lines, areas, success rates, forest plots, heat maps."""
