"""Judging samples: distances and scores in the features of a network, agreement with a twin, and images of both."""
