"""Steps that several processes take together: torch.distributed, and one vector of scalars."""
