"""An MLX process: attaches to the daemon, computes out of shared memory, generates.  Reads no expert from disk."""
