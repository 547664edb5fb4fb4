"""MAR: the module, its blocks, its diffusion head."""
