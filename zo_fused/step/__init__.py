"""One step: go somewhere, look at the loss, come back wiser. No imports here."""
