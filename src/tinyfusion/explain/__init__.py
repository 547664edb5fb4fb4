"""What each block of a model does: loss without it, its updates, its outputs beside those of a teacher."""
