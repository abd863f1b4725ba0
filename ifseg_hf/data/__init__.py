"""Word maps, datasets of images and masks, crops, vocabularies."""
