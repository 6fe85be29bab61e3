"""The trade-off of feature caching: what settings cost and how good their samples are, beside uncached sampling with
fewer steps.

Reading order: config (the points of a sweep), measure (sampling, evaluating and timing them), records (what is known
on the disk, rows, table, advice), plot.
"""
