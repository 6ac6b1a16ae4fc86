"""From groups to one number per candidate."""
