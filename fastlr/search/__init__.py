"""Choosing a rate: range tests, line searches and L-BFGS."""
