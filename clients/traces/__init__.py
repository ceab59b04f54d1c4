"""Looking at routing traces: statistics, replay and pictures.  The files are ``expertd.protocol.traces``."""
