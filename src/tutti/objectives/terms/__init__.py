"""The terms L_i of the unified loss, one file a term; each term owns its head."""
