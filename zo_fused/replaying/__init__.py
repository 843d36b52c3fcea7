"""A log and base weights give the tuned weights. No imports here."""
