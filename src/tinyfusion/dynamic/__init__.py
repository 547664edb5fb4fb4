"""Dynamic width, tokens and depth by timestep: training objective, budget, sub-networks. Routers: `models/attach.py`."""
