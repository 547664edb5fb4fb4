"""The page that draws with models in a browser."""
