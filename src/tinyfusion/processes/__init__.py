"""What a noising process is: draw, predict, losses, step."""
