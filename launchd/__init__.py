"""Handing the daemon to the system's service manager.  Empty so far: until then daemons start on demand."""
