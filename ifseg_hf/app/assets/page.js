() => {
  // The image that Gradio shows has an empty text in place of the image: it is content here, not decoration.
  const describe = () => {
    for (const image of document.querySelectorAll("#image img")) {
      if (!image.alt) image.alt = "The image to segment";
    }
  };
  const fail = (event) => {
    if (!event.target.matches?.("#image img")) return;
    event.target.alt = "This file cannot be shown.";
    event.target.classList.add("unreadable");
  };
  document.addEventListener("error", fail, true);
  new MutationObserver(describe).observe(document.body, { childList: true, subtree: true });
  describe();
}
