"""From rewarded groups to new weights."""
