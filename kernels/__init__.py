"""What gets compiled, and nothing else: rules, primitives, staging and the sweep that runs them."""
