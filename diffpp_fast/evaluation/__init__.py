"""Floor 6: what generators draw, and how good it is: pictures by address, scores, distances, intervals."""
