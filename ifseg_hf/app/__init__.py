"""The page `ifseg app`: segmentation of an image into typed words, in a browser. Needs the extra "app" (Gradio)."""
