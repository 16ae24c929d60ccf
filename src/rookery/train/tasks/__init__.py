"""What is learned: each task owns what its loss needs and returns a dictionary with "loss" and things to log."""
