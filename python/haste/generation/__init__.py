"""From a checkpoint to a folder of images: the settings, the labels, the drawing and the folder."""
