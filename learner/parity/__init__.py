"""Comparison with golden data: what the published implementation computed, on a model small enough to ship."""
