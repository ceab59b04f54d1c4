"""How to split a machine's memory for a model: pure reckoning, for ``expertd plan``.  Measuring is the caller's."""
