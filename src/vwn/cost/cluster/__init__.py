"""The memory that a GPU of many needs for training. ``vwn cost --cluster`` shows it."""
