"""Models as files: what is on this machine (``survey``), and getting more from the hub (``download``)."""
