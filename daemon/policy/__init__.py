"""Which block to evict: pure classes behind one interface (``base.Policy``)."""

from expertd.daemon.policy.base import Block, Policy, PolicyFactory, Statistics
from expertd.daemon.policy.forecast import Forecast
from expertd.daemon.policy.lru import LRU
from expertd.daemon.policy.scored import EWMA, LCP, LFU

POLICIES: dict[str, PolicyFactory] = {"forecast": Forecast, "lru": LRU, "lfu": LFU, "lcp": LCP, "ewma": EWMA}
"""Every policy by its name; the first is the default (``protocol.config.POLICY_NAMES``)."""

__all__ = ["EWMA", "LCP", "LFU", "LRU", "POLICIES", "Block", "Forecast", "Policy", "PolicyFactory", "Statistics"]
