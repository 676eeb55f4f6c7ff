"""How good is it: closed loop in the simulator, open loop on held-out episodes, and their statistics."""
