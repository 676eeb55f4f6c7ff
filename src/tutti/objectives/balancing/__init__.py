"""How the weights lambda_i are chosen: fixed, DWA, FAMO, uncertainty and others."""
