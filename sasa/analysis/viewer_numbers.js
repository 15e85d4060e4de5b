// Numbers of the page: what page.py stored, as weights, measures and rollouts.

const data = JSON.parse(document.getElementById("data").textContent);

const decoded = new Map();
function bytes(text, Kind = Uint8Array) {
  if (!decoded.has(text)) decoded.set(text, Kind.from(atob(text), (c) => c.charCodeAt(0)));
  return decoded.get(text);
}

function normalised(store, index, size) {  // a K x K map stored as bytes -> weights of sum 1
  const map = Array.from(store.subarray(index * size, (index + 1) * size));
  const sum = map.reduce((a, b) => a + b, 0) || 1;
  return map.map((value) => value / sum);
}

function nearest(places, wanted) {  // index of the stored row or column next to the wanted one
  let best = 0;
  places.forEach((place, i) => { if (Math.abs(place - wanted) < Math.abs(places[best] - wanted)) best = i; });
  return best;
}

function onMap(layer, image, row, col) {  // image pixel -> pixel of the layer's map
  return [Math.floor(row * layer.height / image.height), Math.floor(col * layer.width / image.width)];
}

function origin(layer, row, col) {  // first key of the window
  if (layer.block) return [Math.floor(row / layer.size) * layer.size, Math.floor(col / layer.size) * layer.size];
  return [row - layer.back, col - layer.back];
}

function layersOf(image) { return data.networks[image.network].layers; }

function storedPixel(image, l, [row, col]) {  // the stored pixel of layer l nearest to a pixel of the image
  const layer = layersOf(image)[l], kept = image.layers[l];
  const [mapRow, mapCol] = onMap(layer, image, row, col);
  const i = nearest(layer.rows, mapRow), j = nearest(layer.cols, mapCol);
  const at = [layer.rows[i], layer.cols[j]];
  const index = i * layer.cols.length + j;
  const weights = (head) => normalised(bytes(kept.maps), index * layer.heads + head, layer.size ** 2);
  return { layer, at, origin: origin(layer, ...at), weights };
}

// What the same figures are of even weights over the keys of the window that take part: those in the map, or all.
function evenMeasures(layer, at) {
  const pixel = { layer, at, origin: origin(layer, ...at) };
  const inside = Array.from({ length: layer.size ** 2 }, (_, k) => {
    const y = pixel.origin[0] + Math.floor(k / layer.size), x = pixel.origin[1] + k % layer.size;
    return layer.outside || y >= 0 && y < layer.height && x >= 0 && x < layer.width ? 1 : 0;
  });
  const keys = inside.reduce((a, b) => a + b, 0);
  return measuresOf(pixel, inside.map((one) => one / keys));
}

const evens = new Map();
function evenMeasuresOverImage(layer) {  // their mean over the stored pixels, as the stored means of the heads are
  if (!evens.has(layer)) {
    const all = layer.rows.flatMap((row) => layer.cols.map((col) => evenMeasures(layer, [row, col])));
    evens.set(layer, [0, 1, 2].map((i) => all.reduce((sum, figures) => sum + figures[i], 0) / all.length));
  }
  return evens.get(layer);
}

function measuresOf(pixel, weights) {
  let entropy = 0, distance = 0, own = 0;
  weights.forEach((w, k) => {
    const dy = pixel.origin[0] + Math.floor(k / pixel.layer.size) - pixel.at[0];
    const dx = pixel.origin[1] + k % pixel.layer.size - pixel.at[1];
    if (w > 0) entropy -= w * Math.log2(w);
    distance += w * Math.hypot(dy, dx);
    if (dy === 0 && dx === 0) own = w;
  });
  return [entropy, distance, own];
}

// attention_maps.py: rollout. Shares of a pixel of layer `last`, on the map of the first layer of the rollout.
function rollout(image, last, row, col) {
  const layers = layersOf(image), first = data.networks[image.network].rolloutFrom;
  let layer = layers[last];
  let pooled = new Float64Array(layer.height * layer.width);
  pooled[row * layer.width + col] = 1;
  let stay = pooled, share = pooled;
  for (let l = last; l >= first; l--) {
    layer = layers[l];
    if (l < last) [pooled, stay] = backThroughPool(share, layers[l + 1], layer);
    const store = bytes(image.layers[l].mean), size = layer.size ** 2;
    share = Float64Array.from(stay, (value) => value / 2);
    pooled.forEach((value, p) => {
      if (!value) return;
      const weights = normalised(store, p, size);
      const [top, left] = origin(layer, Math.floor(p / layer.width), p % layer.width);
      weights.forEach((w, k) => {
        const y = top + Math.floor(k / layer.size), x = left + k % layer.size;
        if (y >= 0 && y < layer.height && x >= 0 && x < layer.width) share[y * layer.width + x] += value * w / 2;
      });
    });
  }
  return share;
}

function backThroughPool(share, above, layer) {
  const pooled = new Float64Array(layer.height * layer.width), stay = new Float64Array(pooled.length);
  const cell = (y, x) => Math.floor(y * above.height / layer.height) * above.width + Math.floor(x * above.width / layer.width);
  const count = new Float64Array(share.length);
  for (let y = 0; y < layer.height; y++) for (let x = 0; x < layer.width; x++) count[cell(y, x)]++;
  const s = layer.stride, strided = Math.ceil(layer.height / s) === above.height && Math.ceil(layer.width / s) === above.width;
  for (let y = 0; y < layer.height; y++) for (let x = 0; x < layer.width; x++) {
    const part = share[cell(y, x)] / count[cell(y, x)];
    pooled[y * layer.width + x] = part;
    if (!strided) stay[y * layer.width + x] = part;
    else if (y % s === 0 && x % s === 0) stay[y * layer.width + x] = share[(y / s) * above.width + x / s];
  }
  return [pooled, stay];
}

function cosines(table, channels, size) {
  const out = [];
  for (let a = 0; a < size; a++) for (let b = 0; b < size; b++) {
    let dot = 0, aa = 0, bb = 0;
    for (let c = 0; c < channels; c++) {
      const u = table[c * size + a], v = table[c * size + b];
      dot += u * v; aa += u * u; bb += v * v;
    }
    out.push(aa && bb ? dot / Math.sqrt(aa * bb) : 0);
  }
  return out;
}

// The layer of another network that a layer is compared with: of the same name, else at the same depth.
function counterpart(from, to, l) {
  const layers = layersOf(from), others = layersOf(to);
  const same = others.findIndex((layer) => layer.name === layers[l].name);
  return same >= 0 ? same : Math.round(l * (others.length - 1) / Math.max(layers.length - 1, 1));
}

// A pixel of one image at its place in another: [row, col].
function samePlace(from, to, [row, col]) {
  if (from.height === to.height && from.width === to.width) return [row, col];
  return [Math.floor((row + 0.5) * to.height / from.height), Math.floor((col + 0.5) * to.width / from.width)];
}
