// The viewer of the page: word and probability of the pixel under the pointer, or under a marker moved by arrow keys.
// `element`, `props` and `watch` are given by gr.HTML; `props.value` is what viewer_data in pictures.py returns.
const root = element.querySelector(".viewer");
const pictures = [...root.querySelectorAll(".picture")];
const readout = root.querySelector(".readout");
let probe = null; // pixels of the map of words and probabilities
let marker = [0.5, 0.5]; // of the keyboard, as shares of width and height

async function readProbe(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function at([x, y]) {
  const column = Math.min(probe.width - 1, Math.floor(x * probe.width));
  const row = Math.min(probe.height - 1, Math.floor(y * probe.height));
  const [low, high, probability] = probe.data.subarray(4 * (row * probe.width + column));
  const text = `${props.value.names[low + 256 * (high & 127)]}, ${Math.round(probability / 2.55)} %`;
  return high & 128 ? `no word (${text})` : text;
}

function show(picture, place, isMarked) {
  if (!probe) return "";
  const text = at(place);
  const tip = picture.querySelector(".tip");
  const mark = picture.querySelector(".marker");
  tip.textContent = text;
  for (const part of [tip, mark]) {
    part.style.left = `${100 * place[0]}%`;
    part.style.top = `${100 * place[1]}%`;
  }
  tip.classList.toggle("left", place[0] > 0.55);
  tip.classList.toggle("above", place[1] > 0.7);
  tip.style.display = "block";
  mark.style.display = isMarked ? "block" : "none";
  return text;
}

function hide(picture) {
  for (const part of picture.querySelectorAll(".tip, .marker")) part.style.display = "none";
}

function swatchOf(color) {
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.backgroundColor = color;
  return swatch;
}

function draw() {
  const value = props.value;
  root.classList.toggle("empty", !value);
  probe = null;
  readout.textContent = "";
  pictures.forEach(hide);
  if (!value) return;
  for (const kind of ["overlay", "mask"]) {
    const image = root.querySelector(`.${kind} img`);
    // Shares of the picture are shares of the image, whose sides keep their ratio in every window.
    image.onload = () => {
      const ratio = image.naturalWidth / image.naturalHeight;
      image.parentElement.style.setProperty("--ratio", ratio);
      root.querySelector(".pictures").classList.toggle("wide", ratio > 1.8); // one below the other
    };
    image.src = value[kind];
    image.alt = `${kind === "mask" ? "Mask" : "Overlay of image and mask"}: ${value.summary}.`;
  }
  const items = value.legend.map(({ name, color, share }) => {
    const item = document.createElement("li");
    const words = document.createElement("span");
    words.textContent = name;
    const shares = document.createElement("span");
    shares.className = "share";
    shares.textContent = share;
    item.append(swatchOf(color), words, shares);
    return item;
  });
  const rest = [];
  if (value.more) rest.push(`and ${value.more} more words`);
  const without = value.without && `${value.without} without a word`;
  if (without) rest.push(without);
  for (const text of rest) {
    const item = document.createElement("li");
    item.className = "rest";
    if (text === without) item.append(swatchOf("#000"));
    item.append(text);
    items.push(item);
  }
  root.querySelector(".legend").replaceChildren(...items);
  readProbe(value.probe).then((data) => {
    if (props.value && props.value.probe === value.probe) probe = data;
  });
}

for (const picture of pictures) {
  const image = picture.querySelector("img");
  const point = (event) => {
    const box = image.getBoundingClientRect();
    const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (place.every((share) => share >= 0 && share <= 1)) show(picture, place, false);
    else hide(picture);
  };
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") hide(picture); // a finger leaves when it is lifted
  });
  picture.addEventListener("blur", () => hide(picture));
  picture.addEventListener("focus", () => {
    if (picture.matches(":focus-visible")) readout.textContent = show(picture, marker, true);
  });
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault(); // the page does not scroll
    const step = event.shiftKey ? 0.1 : 0.02;
    marker = marker.map((share, axis) => Math.min(0.999, Math.max(0, share + step * move[axis])));
    readout.textContent = show(picture, marker, true);
  });
}
watch("value", draw);
draw();
