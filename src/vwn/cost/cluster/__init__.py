"""What training on many GPUs needs: a GPU's memory and the bytes it sends. ``vwn cost --cluster`` shows it."""
