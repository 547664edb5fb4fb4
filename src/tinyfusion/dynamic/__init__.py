"""Width, tokens and depth decided anew for every timestep: training, budget, sub-networks. Routers: `models/attach.py`."""
