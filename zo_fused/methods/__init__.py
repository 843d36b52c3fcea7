"""A direction and a rule, a file each. No imports here."""
