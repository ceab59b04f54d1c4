"""Which block to evict: pure classes behind one interface (``base.Policy``).  LRU so far."""

from expertd.daemon.policy.base import Block, Policy, PolicyFactory
from expertd.daemon.policy.lru import LRU

__all__ = ["LRU", "Block", "Policy", "PolicyFactory"]
