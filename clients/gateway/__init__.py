"""The gateway: an OpenAI API over HTTP in front of a worker.  Never imports mlx."""
