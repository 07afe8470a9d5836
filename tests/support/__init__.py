"""What tests share and is no test: checkpoints, pictures, small caches, faults."""
