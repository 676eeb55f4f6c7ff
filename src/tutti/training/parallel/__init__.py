"""Training on several processes: DDP and FSDP."""
