// The page: one side for an image, two to compare images or networks. All text reaches it as text, never as markup.

const $ = (id) => document.getElementById(id);
const GLOW = [255, 122, 0], NEGATIVE = [8, 48, 107], POSITIVE = [178, 63, 10];
// image and other are places in data.images, other is -1 without a comparison; row and col are a pixel of the image,
// layer and head are of its network.
const state = { image: 0, other: -1, row: 0, col: 0, layer: 0, head: 0, view: "window" };

// ---- drawing ------------------------------------------------------------------------------------------------------

const greys = new Map();
function grey(image, then) {  // the image without colour and darker, so that the glow shows
  const known = greys.get(image);
  if (known) return known.width ? then(known) : undefined;
  const canvas = document.createElement("canvas"), picture = new Image();
  canvas.width = canvas.height = 0;
  greys.set(image, canvas);
  picture.onload = () => {
    canvas.width = picture.width;
    canvas.height = picture.height;
    const pen = canvas.getContext("2d");
    pen.drawImage(picture, 0, 0);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const mean = (pixels.data[i] + pixels.data[i + 1] + pixels.data[i + 2]) / 3;
      pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 38 + 0.55 * mean;
    }
    pen.putImageData(pixels, 0, 0);
    update();
  };
  picture.src = image.src;
}

// A picture of a part of a layer's map, region [top, left, height, width] in its pixels; cells(glow) paints weights.
function paint(canvas, image, layer, region, cells, marks) {
  const side = canvas.clientWidth, [top, left, height, width] = region;
  grey(image, (base) => {
    const density = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = canvas.height = Math.round(side * density);
    const pen = canvas.getContext("2d"), unitY = canvas.height / height, unitX = canvas.width / width;
    pen.imageSmoothingEnabled = image.width > 96;
    const y0 = Math.max(top, 0), y1 = Math.min(top + height, layer.height), x0 = Math.max(left, 0), x1 = Math.min(left + width, layer.width);
    const scaleY = image.height / layer.height, scaleX = image.width / layer.width;
    pen.drawImage(base, x0 * scaleX, y0 * scaleY, (x1 - x0) * scaleX, (y1 - y0) * scaleY,
      (x0 - left) * unitX, (y0 - top) * unitY, (x1 - x0) * unitX, (y1 - y0) * unitY);
    const box = (y, x, h, w) => {  // whole screen pixels, so that neighbours neither overlap nor part
      const a = Math.round((x - left) * unitX), b = Math.round((y - top) * unitY);
      return [a, b, Math.round((x + w - left) * unitX) - a, Math.round((y + h - top) * unitY) - b];
    };
    cells((y, x, h, w, share) => {
      pen.fillStyle = `rgba(${GLOW}, ${0.92 * share})`;
      pen.fillRect(...box(y, x, h, w));
    });
    const line = Math.max(1, Math.round(density * (side > 100 ? 1.5 : 1)));
    marks.forEach(([y, x, h, w, colour]) => {
      const [a, b, c, d] = box(y, x, h, w);
      pen.strokeStyle = colour;
      pen.lineWidth = line;
      pen.strokeRect(a + line / 2, b + line / 2, Math.max(c - line, 1), Math.max(d - line, 1));
    });
  });
}

// How strong the orange of a map's largest weight is: full for a sharp map, pale for one that is nearly even, which
// would else be painted as if all of it mattered most.
function strength(pixel, weights) {
  const most = evenMeasures(pixel.layer, pixel.at)[0];
  return most ? Math.max(1 - (measuresOf(pixel, weights)[0] / most) ** 4, 0.3) : 1;
}

function paintHead(canvas, image, pixel, head, whole) {
  const { layer, at, origin: [top, left] } = pixel, weights = pixel.weights(head);
  const size = layer.size, largest = Math.max(...weights) / strength(pixel, weights) || 1;
  const region = whole ? [0, 0, layer.height, layer.width] : [top, left, size, size];
  const marks = [[...at, 1, 1, "#fff"]];
  if (whole) marks.push([top, left, size, size, "rgba(255, 255, 255, 0.45)"]);
  paint(canvas, image, layer, region, (glow) => weights.forEach((w, k) => {
    const y = top + Math.floor(k / size), x = left + k % size;
    if (y >= 0 && y < layer.height && x >= 0 && x < layer.width) glow(y, x, 1, 1, w / largest);
  }), marks);
}

function heatMap(values, height, width, largest, name) {  // signed numbers: blue below 0, white, orange above
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  const pen = canvas.getContext("2d"), pixels = pen.createImageData(width, height);
  values.forEach((value, i) => {
    const share = Math.min(Math.abs(value) / (largest || 1), 1), end = value < 0 ? NEGATIVE : POSITIVE;
    end.forEach((part, c) => { pixels.data[4 * i + c] = 255 + share * (part - 255); });
    pixels.data[4 * i + 3] = 255;
  });
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

function fill(parent, ...children) { parent.replaceChildren(...children); return parent; }
function make(tag, text, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}
function button(action, ...children) {
  const node = make("button", undefined, ...children);
  node.type = "button";
  node.onclick = action;
  return node;
}
function tint(node, value, largest) {  // a bar as long as the value, orange above 0, blue below
  node.style.setProperty("--share", `${100 * Math.min(Math.abs(value) / (largest || 1), 1)}%`);
  node.style.setProperty("--tint", value < 0 ? "var(--against)" : "var(--bar)");
  return node;
}

function number(value, digits = 2) {
  if (value === null) return "not finite";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
}
const per_cent = (share) => share === null ? "not finite" : `${(100 * share).toFixed(1)}%`;

// ---- a side -------------------------------------------------------------------------------------------------------

class Side {
  constructor(image) {
    this.image = image;
    this.network = data.networks[image.network];
    this.node = $("side").content.firstElementChild.cloneNode(true);
    this.parts = {};
    this.node.querySelectorAll("[data-part]").forEach((part) => { this.parts[part.dataset.part] = part; });
    this.most = Math.max(...image.effects.map((effect) => Math.abs(effect.mean.drop)), 0);
    this.buildTiles();
    this.buildDecision();
    this.buildProbes();
    for (const name of ["map", "rollout"]) this.listen(this.parts[name]);
    this.parts.window.onclick = () => go({ view: "window" });
    this.parts.whole.onclick = () => go({ view: "whole" });
  }

  get layer() { return counterpart(data.images[state.image], this.image, state.layer); }
  get head() { return Math.min(state.head, this.network.layers[this.layer].heads - 1); }
  get pixel() { return samePlace(data.images[state.image], this.image, [state.row, state.col]); }
  effectOf(l, head) { return this.image.effects.find((effect) => effect.layer === l && effect.head === head); }

  choose(l, head) { go({ layer: counterpart(this.image, data.images[state.image], l), head }); }
  point(pixel) {
    const [row, col] = samePlace(this.image, data.images[state.image], pixel);
    go({ row, col });
  }

  buildTiles() {
    const widest = Math.max(...this.network.layers.map((layer) => layer.heads));
    this.tiles = this.network.layers.map((layer, l) => {
      const row = make("div"), grid = make("div");
      row.className = "layer";
      grid.className = "tiles";
      grid.style.setProperty("--heads", widest);
      row.append(make("span", undefined, layer.name, make("br"), make("small", ` ${layer.height} \u00d7 ${layer.width}`)), grid);
      this.parts.layers.append(row);
      return Array.from({ length: layer.heads }, (_, head) => {
        const canvas = make("canvas"), effect = this.effectOf(l, head);
        const tile = button(() => this.choose(l, head), canvas);
        let name = `${layer.name}, head ${head + 1}`;
        if (effect) {
          tile.append(tint(make("small", number(effect.mean.drop)), effect.mean.drop, this.most));
          name += `, silenced: logit lost ${number(effect.mean.drop)}`;
        }
        tile.setAttribute("aria-label", name);
        tile.onkeydown = (event) => this.moveTile(event, l, head);
        grid.append(tile);
        return { canvas, tile };
      });
    });
    if (this.image.effects.length) this.parts["tiles-note"].textContent = "Below each map: the logit that the decision loses when that head is silenced by its mean.";
  }

  moveTile(event, l, head) {
    const step = arrow(event);
    if (!step) return;
    const next = Math.min(Math.max(l + step[0], 0), this.tiles.length - 1);
    const other = Math.min(Math.max(head + step[1], 0), this.tiles[next].length - 1);
    this.choose(next, other);
    this.tiles[next][other].tile.focus();
  }

  buildDecision() {
    const { guess, effects, label } = this.image;
    this.parts.label.textContent = label ? `label: ${label}` : "";
    fill(this.parts.guess, ...guess.map(([name, share]) => {
      const line = make("li", undefined, make("span", name), make("span", per_cent(share)));
      line.style.setProperty("--share", `${100 * (share || 0)}%`);
      return line;
    }));
    this.parts["effects-card"].hidden = !effects.length;
    if (!effects.length) return;
    const decided = guess[0][0];
    this.parts["class-head"].textContent = `P(${decided})`;
    const sorted = [...effects].sort((a, b) => b.mean.drop - a.mean.drop);
    this.rows = sorted.map((effect) => {
      const name = `${this.network.layers[effect.layer].name}, head ${effect.head + 1}`;
      const action = button(() => this.choose(effect.layer, effect.head), name);
      const row = make("tr", undefined, make("td", undefined, action),
        tint(make("td", number(effect.mean.drop)), effect.mean.drop, this.most), make("td", number(effect.zero.drop)),
        make("td", per_cent(effect.mean.share)), make("td", effect.mean.same ? "same" : `class ${effect.mean.then}`));
      return { effect, row, action };
    });
    this.rows.forEach((line, i) => { line.action.onkeydown = (event) => this.moveRow(event, i); });
    fill(this.parts.effects, ...this.rows.map(({ row }) => row));
    const turning = this.rows.filter(({ effect }) => !effect.mean.same).map(({ action }) => action.textContent);
    const few = turning.slice(0, 2).join("; ") + (turning.length > 2 ? ` and ${turning.length - 2} more` : "");
    this.parts["effects-note"].textContent = `heads whose silencing by the mean alone changes the decision: ${few || "none"} (of ${effects.length})`;
  }

  moveRow(event, i) {
    const step = arrow(event);
    if (!step) return;
    const { effect, action } = this.rows[Math.min(Math.max(i + step[0] + step[1], 0), this.rows.length - 1)];
    this.choose(effect.layer, effect.head);
    action.focus();
  }

  buildProbes() {
    const { stages, note } = this.network.probes;
    this.parts["probes-table"].hidden = !stages.length;
    this.parts["probes-note"].textContent = note;
    if (!stages.length) return;
    this.parts["probes-head"].textContent = `P(${this.image.guess[0][0]})`;
    const line = (name, top1, [guess, share]) => {
      const score = make("td", `${top1.toFixed(1)}%`);
      score.style.setProperty("--share", `${top1}%`);
      const sure = make("td", per_cent(share));
      sure.style.setProperty("--share", `${100 * share}%`);
      return make("tr", undefined, make("td", name), score, make("td", guess), sure);
    };
    fill(this.parts.probes, ...stages.map(([name, top1], i) => line(name, top1, this.image.probes[i])));
  }

  listen(canvas) {
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const within = (share, side) => Math.min(Math.max(Math.floor(share * side), 0), side - 1);
      this.point([within((event.clientY - box.top) / box.height, this.image.height), within((event.clientX - box.left) / box.width, this.image.width)]);
    };
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse" && event.buttons === 1) point(event); });
    canvas.addEventListener("keydown", (event) => { const step = arrow(event); if (step) this.movePixel(step); });
  }

  movePixel([down, right]) {  // to the next stored pixel of the chosen layer
    const { layer, at } = storedPixel(this.image, this.layer, this.pixel);
    const step = (places, place, by, side, length) => {
      const next = places[Math.min(Math.max(places.indexOf(place) + by, 0), places.length - 1)];
      return Math.floor((next + 0.5) * length / side);
    };
    this.point([step(layer.rows, at[0], down, layer.height, this.image.height), step(layer.cols, at[1], right, layer.width, this.image.width)]);
  }

  update() {
    const { parts, image } = this, l = this.layer, head = this.head, pixel = storedPixel(image, l, this.pixel), { layer, at } = pixel;
    parts.title.hidden = data.images.length === 1 || state.other < 0;
    parts.title.textContent = nameOf(image);
    paintHead(parts.map, image, pixel, head, true);
    fill(parts["map-caption"], make("b", `${layer.name}, head ${head + 1}`), `, from ${pixelName(at)} of ${layer.height} \u00d7 ${layer.width}`);
    fill(parts.spread, make("b", "Where it looks:"), this.spread(l, head, pixel));
    this.updateRollout(l);
    this.updateEffect(l, head);
    this.network.layers.forEach((_, i) => {
      const there = storedPixel(image, i, this.pixel);
      this.tiles[i].forEach(({ canvas, tile }, h) => {
        const chosen = i === l && h === head;
        tile.setAttribute("aria-pressed", chosen);
        tile.tabIndex = chosen ? 0 : -1;
        paintHead(canvas, image, there, h, state.view === "whole");
      });
      this.tiles[i][0].tile.closest(".layer").classList.toggle("on", i === l);
    });
    for (const name of ["window", "whole"]) parts[name].setAttribute("aria-pressed", state.view === name);
    this.updateMeasures(l, head, pixel);
    this.updateTables(layer, head);
  }

  // Where the head looks, in words: how even its map is here and over the image.
  spread(l, head, pixel) {
    const { layer } = pixel, here = measuresOf(pixel, pixel.weights(head))[0], most = evenMeasures(layer, pixel.at)[0];
    const mean = this.image.layers[l].measures[head], even = evenMeasuresOverImage(layer);
    if (mean.includes(null)) return " its weights are not finite.";
    const shape = (found, full) => full === 0 || found > 0.97 * full ? "nearly even over" : found > 0.8 * full ? "spread over" : "on a part of";
    const weights = pixel.weights(head), size = layer.size, keys = Math.round(2 ** most);
    const cut = keys < size ** 2 ? ` (${keys} of its pixels lie in the map)` : "";
    const window = `its ${size} \u00d7 ${size} window${cut}`;
    const best = weights.indexOf(Math.max(...weights)), place = [pixel.origin[0] + Math.floor(best / size), pixel.origin[1] + best % size];
    const most_on = here > 0.97 * most ? "" : `, ${per_cent(weights[best])} of the weight on row ${place[0]}, column ${place[1]}`;
    return ` from this pixel ${shape(here, most)} ${window}: entropy ${number(here)} bit, even weights have ${number(most)}${most_on}. ` +
      `Over the image ${shape(mean[0], even[0])} it: ${number(mean[0])} of ${number(even[0])} bit, mean distance ${number(mean[1])} pixels (even ${number(even[1])}), own pixel ${per_cent(mean[2])} (even ${per_cent(even[2])}). Windows are cut at the border.`;
  }

  updateEffect(l, head) {
    const effect = this.effectOf(l, head), [decided, probability] = this.image.guess[0];
    (this.rows || []).forEach((line) => {
      const on = line.effect === effect;
      line.row.classList.toggle("on", on);
      line.action.tabIndex = on ? 0 : -1;
      if (on) intoView(line.row);
    });
    if (!effect) return fill(this.parts.effect);
    const line = (how, { logit, drop, share, then, thenShare, same }) => make("span", undefined, make("b", `Silenced by ${how}:`),
      ` the logit of class ${decided} ${drop < 0 ? "rises" : "falls"} by ${number(Math.abs(drop))} from ${number(logit + drop)} to ${number(logit)}, ` +
      `its probability goes from ${per_cent(probability)} to ${per_cent(share)}; ` +
      (same ? "the decision stays." : `the decision becomes class ${then} (${per_cent(thenShare)}).`));
    return fill(this.parts.effect, line("its mean", effect.mean), line("zero", effect.zero));
  }

  updateRollout(l) {
    const { parts, image } = this, from = this.network.rolloutFrom, first = this.network.layers[from], last = this.network.layers[l];
    const region = [0, 0, first.height, first.width];
    if (l < from) {
      paint(parts.rollout, image, first, region, () => {}, []);
      parts["rollout-caption"].textContent = `no rollout: ${last.name} reads the image itself`;
      return;
    }
    const [row, col] = onMap(last, image, ...this.pixel), share = rollout(image, l, row, col), largest = Math.max(...share) || 1;
    const scale = [first.height / last.height, first.width / last.width];
    paint(parts.rollout, image, first, region, (glow) => share.forEach((value, p) => {
      glow(Math.floor(p / first.width), p % first.width, 1, 1, Math.sqrt(value / largest));
    }), [[row * scale[0], col * scale[1], scale[0], scale[1], "#fff"]]);
    const through = l === from ? "" : ` down to ${first.name}`;
    fill(parts["rollout-caption"], make("b", "rollout"), `, of all heads and shortcuts together, not of this head: ${last.name}${through}, from ${pixelName([row, col])}`);
  }

  updateMeasures(l, chosen, pixel) {
    const { layer } = pixel, kept = this.image.layers[l], most = [2 * Math.log2(layer.size) || 1, layer.size / 2 * Math.SQRT2, 1];
    this.parts["measures-title"].textContent = `How sharp the heads of ${layer.name} are`;
    this.parts.largest.textContent = `largest attention score before the softmax: ${number(kept.largest)}`;
    fill(this.parts.measures, ...kept.measures.map((mean, head) => {
      const here = measuresOf(pixel, pixel.weights(head)), row = make("tr", undefined, make("td", head + 1));
      row.className = head === chosen ? "on" : "";
      here.forEach((value, i) => [value, mean[i]].forEach((figure) => {
        const cell = make("td", figure !== null && i === 2 ? (100 * figure).toFixed(1) : number(figure));
        cell.style.setProperty("--share", `${Math.min(100 * figure / most[i], 100)}%`);
        row.append(cell);
      }));
      return row;
    }));
    const row = make("tr", undefined, make("td", "even"));
    evenMeasures(layer, pixel.at).forEach((value, i) => [value, evenMeasuresOverImage(layer)[i]].forEach((figure) => {
      row.append(make("td", i === 2 ? (100 * figure).toFixed(1) : number(figure)));
    }));
    this.parts.measures.append(row);
  }

  updateTables(layer, head) {
    const { tables } = layer, { parts } = this;
    parts["tables-title"].textContent = `Embeddings of ${layer.name}`;
    if (!tables) {
      parts["tables-note"].textContent = "this layer has none";
      return fill(parts.tables);
    }
    const which = Math.min(head, tables.count - 1), length = tables.channels * layer.size;
    const whose = tables.count > 1 ? `head ${which + 1}` : "shared by its heads";
    parts["tables-note"].textContent = `${whose}; blue below 0, orange above, up to ${number(tables.largest)}`;
    const figures = ["rows", "columns"].map((name) => {
      const table = Array.from(bytes(tables[name], Int8Array).subarray(which * length, (which + 1) * length));
      const values = heatMap(table, tables.channels, layer.size, 127, `${name}: ${tables.channels} channels by ${layer.size} offsets`);
      const alike = heatMap(cosines(table, tables.channels, layer.size), layer.size, layer.size, 1, `${name}: cosine between offsets`);
      return [make("figure", undefined, values, make("figcaption", `${name}: channels down, offsets across`)),
        make("figure", undefined, alike, make("figcaption", `${name}: cosine between offsets`))];
    });
    return fill(parts.tables, ...figures.flat());
  }
}

// ---- the page -----------------------------------------------------------------------------------------------------

let sides = [];

function pixelName([row, col]) { return `pixel (row ${row}, column ${col})`; }

function intoView(row) {  // within its list: the page itself stays where it is
  const list = row.closest(".scroll"), head = list.querySelector("thead").offsetHeight;
  const top = row.offsetTop - head, bottom = row.offsetTop + row.offsetHeight - list.clientHeight;
  if (list.scrollTop > top) list.scrollTop = top;
  else if (list.scrollTop < bottom) list.scrollTop = bottom;
}

function nameOf(image) {
  const network = data.networks.length > 1 ? `${data.networks[image.network].name}: ` : "";
  return `${network}${image.name}`;
}

function build() {
  $("about").textContent = data.about;
  $("stored").textContent = data.stored;
  $("notice").hidden = !data.notice;
  $("notice").textContent = data.notice;
  document.title = `What the heads attend to: ${data.title}`;
  $("choice").hidden = data.images.length === 1;
  const option = (text, value) => { const node = make("option", text); node.value = value; return node; };
  fill($("show"), ...data.images.map((image, i) => option(nameOf(image), i)));
  fill($("other"), option("nothing", -1), ...data.images.map((image, i) => option(nameOf(image), i)));
  $("show").onchange = () => go({ image: Number($("show").value) });
  $("other").onchange = () => go({ other: Number($("other").value) });
  const ofFirst = data.images.filter((image) => image.network === 0);
  if (ofFirst.length > 1) ofFirst.forEach((image, i) => {
    const picture = new Image();
    picture.src = image.src;
    picture.alt = image.name;
    $("thumbs").append(button(() => chooseImage(i), picture));
  });
  window.addEventListener("resize", update);
  window.addEventListener("hashchange", () => { read(); show(); });
}

function chooseImage(place) {  // the same image on both sides where two networks are compared
  const find = (network) => data.images.findIndex((image) => image.network === network && image.place === place);
  const left = data.images[state.image].network, right = state.other < 0 ? left : data.images[state.other].network;
  go({ image: find(left), other: left === right ? state.other : find(right) });
}

function arrow(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return null;
  event.preventDefault();
  return step;
}

function go(change) {
  const before = data.images[state.image];
  Object.assign(state, change);
  const image = data.images[state.image];
  if (change.image !== undefined && image.network !== before.network) state.layer = counterpart(before, image, state.layer);
  limit();
  history.replaceState(null, "", "#" + new URLSearchParams(state));
  show();
}

function limit() {
  const image = data.images[state.image], layers = layersOf(image);
  state.layer = Math.min(state.layer, layers.length - 1);
  state.head = Math.min(state.head, layers[state.layer].heads - 1);
  state.row = Math.min(state.row, image.height - 1);
  state.col = Math.min(state.col, image.width - 1);
}

// What the address holds, else the centre of the first image and the head that counts most.
function read() {
  const image = data.images[0], first = [...image.effects].sort((a, b) => b.mean.drop - a.mean.drop)[0];
  Object.assign(state, { image: 0, other: data.compare, row: image.height >> 1, col: image.width >> 1, view: "window" });
  Object.assign(state, first ? { layer: first.layer, head: first.head } : { layer: data.networks[0].rolloutFrom, head: 0 });
  const low = { image: 0, other: -1, row: 0, col: 0, layer: 0, head: 0 };
  const high = { image: data.images.length - 1, other: data.images.length - 1 };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (key in low) state[key] = Math.min(Math.max(Number.parseInt(value) || 0, low[key]), high[key] ?? 1e9);
    if (key === "view") state.view = value === "whole" ? "whole" : "window";
  }
  limit();
}

function show() {
  const images = [state.image, ...(state.other < 0 ? [] : [state.other])].map((i) => data.images[i]);
  if (images.length !== sides.length || images.some((image, i) => image !== sides[i].image)) {
    sides = images.map((image) => new Side(image));
    fill($("sides"), ...sides.map((side) => side.node));
    $("sides").classList.toggle("two", sides.length > 1);
  }
  $("show").value = state.image;
  $("other").value = state.other;
  [...$("thumbs").children].forEach((thumb, i) => thumb.setAttribute("aria-pressed", i === data.images[state.image].place));
  update();
}

function update() { sides.forEach((side) => side.update()); }

build();
read();
show();
sides[0].parts.map.focus({ preventScroll: true });
