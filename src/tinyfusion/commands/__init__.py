"""The verbs: one module for each command."""
