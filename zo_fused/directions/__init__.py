"""How z is made. No imports here."""
