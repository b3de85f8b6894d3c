"""One step: from gradients and settings to the tables that a compiled kernel reads, and what it reported."""
