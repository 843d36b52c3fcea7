"""What a projected gradient does to the weights. No imports here."""
