"""Judging samples: Fréchet distance, label accuracy, and the pictures that go with the numbers."""
