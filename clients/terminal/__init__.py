"""What commands show in a terminal: the parts of ``status``, ``top`` and ``chat`` that print nothing."""
