"""What gets compiled and what compiles it: rules, their staging, and the kernels that run them."""
