"""Two rewards for rere, as a package of their own."""
