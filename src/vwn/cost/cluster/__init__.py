"""Planning a training run on paper: what fits on a cluster, what is sent, how long a step takes (``docs/scale.md``).

:func:`vwn.cost.cluster.plan.plans` is the whole of it; ``vwn cost --cluster`` shows it.
"""
