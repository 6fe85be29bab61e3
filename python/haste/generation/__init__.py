"""From a checkpoint to a folder of pictures: the settings, the labels, the drawing and the folder."""
