"""Training by one protocol: val chooses, test is read once. Jobs, batches, losses, engine, loop, networks."""
