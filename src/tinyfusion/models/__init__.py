"""What a diffusion transformer is: blocks, checkpoints, plans."""
