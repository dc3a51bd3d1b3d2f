"""How near generated shapes come to real ones: distances between shapes, and metrics between sets of them."""
