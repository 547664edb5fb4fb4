"""DiT: the module, its widths, its routers, the layout of diffusers."""
