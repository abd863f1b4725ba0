"""Word maps, data sets of images and masks, crops, vocabularies."""
