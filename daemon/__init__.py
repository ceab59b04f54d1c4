"""The cache: SSD reads, pools in shared memory, the residency table, eviction.  Imports no mlx and no tokenizer."""
