"""Non-finite losses and gradients: found, skipped, or answered with a rollback."""
