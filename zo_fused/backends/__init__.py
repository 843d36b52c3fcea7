"""One module per backend: `why_not(device_type)` and the six sweeps. No imports here."""
