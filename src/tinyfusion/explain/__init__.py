"""What each block of a model does: loss without it, its updates, its outputs compared with those of a teacher."""
