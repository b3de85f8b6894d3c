"""Searches for a learning rate or a step length: range tests, line searches and L-BFGS."""
