"""Model families: architectures, conversions, declarations."""
