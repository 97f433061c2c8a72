"""What is minimised: sums over supervised positions, never means, so that they add up across ranks."""
