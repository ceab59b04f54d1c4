"""What commands show in a terminal: the pure parts of ``status``, ``top`` and ``chat``, without any output of theirs."""
