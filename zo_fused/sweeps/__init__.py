"""How noise reaches the weights: one read and one write of each. No imports here."""
