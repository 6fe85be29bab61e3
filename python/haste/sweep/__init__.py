"""The trade-off of feature caching: what settings cost and what they sample, beside uncached sampling with fewer steps.

Reading order: points (which settings), quality (what an image is held against), cost (seconds, FLOPs, memory),
records (what is known already), measure (the sweep itself), rows (the numbers of a table), then table, plot, advice.
"""
