"""Blocks of a transformer: the stack, streams, skipping, plans, widths, routers."""
