"""How profiles are made: of routing traces, and of other programs' files.

What one is, and where it is kept: ``expertd.protocol.profiles``.
"""
