"""Judging samples: distances and scores in the features of a network, fidelity with a baseline, and images of both."""
