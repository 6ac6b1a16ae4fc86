"""Titles, interactions and the title trie: everything that is known before a model runs."""
