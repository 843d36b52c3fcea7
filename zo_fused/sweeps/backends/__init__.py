"""One module per backend: `why_not(device_type)` and the sweeps. No imports here."""
