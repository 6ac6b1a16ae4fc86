"""Measurements of speed and memory, always as ratios against something else on the same machine."""
