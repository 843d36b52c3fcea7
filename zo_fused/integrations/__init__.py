"""zo_fused inside other tools (docs/integrations.md). Each module is for one of them, which loads
it by its name; nothing of zo_fused imports them."""
