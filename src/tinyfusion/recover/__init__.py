"""Bring a cut model back: fine-tuning and distillation, as objectives for the one loop."""
