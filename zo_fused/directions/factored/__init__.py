"""Low-rank directions at the side of the weights, in the forward pass. No imports here."""
