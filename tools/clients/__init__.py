"""Real clients against a real gateway: ``python -m tools.clients``."""
