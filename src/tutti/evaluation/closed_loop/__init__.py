"""Success rates from rollouts in a simulator, with controls and videos."""
