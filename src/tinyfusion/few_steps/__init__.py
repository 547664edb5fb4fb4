"""Distillation of a sampling in few steps: objectives of a student that makes in one step what its teacher makes in many."""
