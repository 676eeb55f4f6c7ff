"""How K losses become one gradient: one backward pass, K gradients, masks, aggregators."""
