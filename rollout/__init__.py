"""From prompts to groups of candidate titles, each with its log-probabilities."""
