() => {
  // The image that Gradio shows has an empty text in place of the image: it is content here, not decoration.
  const describe = () => {
    for (const image of document.querySelectorAll("#image img")) {
      if (!image.alt) image.alt = "The image to segment";
    }
  };
  new MutationObserver(describe).observe(document.body, { childList: true, subtree: true });
  describe();
}
