"""One module per backend: `why_not(device_type)` and the five sweeps. No imports here."""
