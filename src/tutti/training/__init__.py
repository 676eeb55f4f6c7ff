"""The training floor: how a loss moves parameters, exactly and resumably."""
