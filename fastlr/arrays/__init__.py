"""Memory of the user's and ours: trees of arrays, where they are, flat buffers, and the columns of a step."""
