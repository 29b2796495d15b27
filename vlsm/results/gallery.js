"use strict";
const started = performance.now();
const {records, runs, summaries, side} = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const BINS = 10;  // of DSC
const EAGER = 300;  // a page of at most so many records loads all images at once, so that it can be printed at any time
const CONTROLS = ["a", "b", "sort", "filter", "class", "group", "size", "prompt", "search"].filter(id => $(id));
const SINGLE = runs.length === 1;

// What all runs have in common of a record; what is missed, or a false alarm.
for (const record of records) {
  const [first] = record.scores;
  Object.assign(record, {image: first.image, mask: first.mask, class_word: first.class, group: first.group,
                         empty: first.target_empty});
  for (const score of record.scores) {
    score.missed = score.pred_empty && !record.empty;
    score.alarm = record.empty && !score.pred_empty;
  }
}

let shown = [];  // indices of the records chosen, in their order
let bin = null;  // the chosen bar of the histogram
let at = -1;  // place in `shown` of the open record
let leaving = false;  // whether the browser is on its way back from an open record's address
let openedAt = -1;  // the place that was opened first, before "next" and "previous"

// Words and elements

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

const percent = x => `${(100 * x).toFixed(1)} %`;
const ofRun = (words, k) => SINGLE ? words : `${words}: ${runs[k]}`;

function distance(record, score) {
  if (score.hd95 !== null) return `${score.hd95.toFixed(1)} ${score.unit}`;
  return record.empty ? "undefined (the true mask is empty)" : "undefined (nothing was predicted)";
}

function meanWords(summary, name, factor, unit) {
  const {mean, ci95, n_undefined: undefinedOnes} = summary[name];
  const fixed = x => (factor * x).toFixed(2);
  let words = mean === null ? "undefined" : `${fixed(mean)} ${ci95 ? `[${ci95.map(fixed).join(", ")}] ` : ""}${unit}`;
  if (undefinedOnes) words += ` (undefined for ${undefinedOnes}: one of the two masks is empty)`;
  return `${{dsc: "mean DSC", iou: "IoU", nsd: "NSD", hd95: "HD95"}[name]} ${words}`;
}

function showMeans() {
  summaries.forEach((summary, k) => {
    const phrases = ["dsc", "iou", "nsd"].map(name => meanWords(summary, name, 100, "%"));
    phrases.push(meanWords(summary, "hd95", 1, summary.unit));
    $("means").append(make("p", {}, make("b", {textContent: runs[k]}), ": " + phrases.join("; ")));
  });
}

// The panels of a record: the image, with layers on it

function layer(record, name, large, className = "") {
  return make("img", {src: `thumbs/${record.id}-${name}${large && record.original ? "-full" : ""}.png`, alt: "", className, draggable: false});
}

function photograph(record, title, large) {
  const image = make("img", {alt: `${title} of ${record.image}`, draggable: false});
  const small = `thumbs/${record.id}.jpg`;
  // The original may have been moved since: then the small image takes its place.
  image.onerror = () => { image.onerror = null; image.src = small; tellSource(record, false); };
  image.src = large && record.original ? record.original : small;
  return image;
}

function stack(record, title, layers, large) {
  const box = make("div", {className: "stack"}, make("div", {className: "layers"}, photograph(record, title, large), ...layers));
  box.style.aspectRatio = Math.min(Math.max(record.width / record.height, 1 / 4), 8);  // strips are not to scale
  return make("figure", {}, box, make("figcaption", {textContent: title, title}));
}

function panels(record, large = false) {
  const box = make("div", {className: "panels"}, stack(record, "image", [], large),
                   stack(record, "ground truth", [layer(record, "truth", large)], large));
  runs.forEach((_, k) => {
    const predicted = [layer(record, "p" + k, large, "predicted")];
    if (large) predicted.push(layer(record, "truth", large, "instead"));
    box.append(stack(record, ofRun("prediction", k), predicted, large),
               stack(record, ofRun("difference", k), [layer(record, "d" + k, large)], large));
  });
  return box;
}

function measures(record, score, k, all) {
  const values = [["DSC", percent(score.dsc)], ["HD95", distance(record, score)]];
  if (all) values.splice(1, 0, ["IoU", percent(score.iou)], ["NSD", percent(score.nsd)]);
  const line = make("span", {}, SINGLE ? "" : runs[k] + ": ");
  values.forEach(([title, value], n) => line.append(n ? ", " : "", title + " ", make("b", {textContent: value})));
  return line;
}

function words(record, all = false) {
  const line = make("div", {className: "words"});
  const add = (textContent, className = "") => line.append(make("span", {textContent, className}));
  if (record.class_word) add(record.class_word);
  record.scores.forEach((score, k) => {
    line.append(measures(record, score, k, all));
    if (score.missed) add(ofRun("nothing predicted", k), "tag");
    if (score.alarm) add(ofRun("false alarm", k), "tag");
  });
  if (record.empty) add("empty true mask");
  if (!SINGLE) add(gainWords(record), "gain");
  for (const prompt of new Set(record.scores.map(score => score.prompt))) add(`“${prompt}”`, "prompt");
  return line;
}

// Cards; their panels are made when they come near the window, or before they are printed

const cards = [];

function makeCard(record, index) {
  const name = make("button", {type: "button", className: "name", textContent: record.image});
  const card = make("article", {}, name, words(record));
  card.addEventListener("click", () => open(shown.indexOf(index)));
  card.dataset.index = index;
  return card;
}

function fill(index) {
  const card = cards[index];
  if (!card.querySelector(".panels")) card.prepend(panels(records[index]));
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    near.unobserve(entry.target);
    fill(entry.target.dataset.index);
  }
}, {rootMargin: "600px"});

const cardImages = () => [...$("cards").querySelectorAll("img")];

function preparePrint() {
  shown.forEach(fill);
  $("late").hidden = cardImages().every(image => image.complete);  // a browser does not wait for images
}

async function printAll() {
  shown.forEach(fill);
  $("summary").textContent = "Loading the images ...";
  await Promise.allSettled(cardImages().map(image => image.decode()));
  summarise();
  print();
}

// Choosing: filters, order, histogram

const value = id => $(id)?.value ?? "";
const scoreA = record => record.scores[+value("a")];
const gain = record => scoreA(record).dsc - record.scores[+value("b")].dsc;
const signed = x => (x < 0 ? "\u2212" : "+") + (100 * Math.abs(x)).toFixed(1);
const gainWords = record => `DSC of A \u2212 B: ${signed(gain(record))} points`;
const farthest = record => scoreA(record).hd95 ?? Infinity;
const binOf = record => Math.min(BINS - 1, Math.floor(scoreA(record).dsc * BINS));

const FILTERS = {
  all: () => true,
  low: record => scoreA(record).dsc < 0.5,
  missed: record => scoreA(record).missed,
  empty: record => record.empty,
  alarm: record => scoreA(record).alarm,
};
const ORDERS = {
  worst: (a, b) => scoreA(a).dsc - scoreA(b).dsc,
  best: (a, b) => scoreA(b).dsc - scoreA(a).dsc,
  hd95: (a, b) => farthest(b) === farthest(a) ? 0 : farthest(b) - farthest(a),
  gain: (a, b) => gain(b) - gain(a),
  loss: (a, b) => gain(a) - gain(b),
  name: (a, b) => a.image.localeCompare(b.image, undefined, {numeric: true}),
};

const SIZES = ["small", "medium", "large"];
const sizes = records.filter(record => !record.empty).map(record => record.size).sort((a, b) => a - b);
const limits = [1, 2].map(third => sizes[Math.floor(third * sizes.length / 3)]);

function sizeOf(record) {
  return record.empty ? "" : SIZES[limits.filter(limit => record.size >= limit).length];
}

function fits(record) {
  const texts = record.scores.map(score => score.prompt);
  return FILTERS[value("filter")](record)
    && (!value("class") || record.class_word === value("class"))
    && (!value("group") || record.group === value("group"))
    && (!value("size") || sizeOf(record) === value("size"))
    && (!value("prompt") || texts.includes(value("prompt")))
    && [record.image, ...texts].join(" ").toLowerCase().includes(value("search").toLowerCase());
}

function update() {
  const fitting = records.map((_, index) => index).filter(index => fits(records[index]));
  const before = shown.join();
  shown = fitting.filter(index => bin === null || binOf(records[index]) === bin);
  shown.sort((a, b) => ORDERS[value("sort")](records[a], records[b]));
  // Only another choice touches the cards: to put them anew would lose the scroll place and the focus.
  if (shown.join() !== before || !$("cards").firstChild) showCards();
  if (!SINGLE) cards.forEach((card, index) => { card.querySelector(".gain").textContent = gainWords(records[index]); });
  drawHistogram(fitting);
  summarise();
}

function showCards() {
  const none = make("p", {textContent: records.length ? "No record fits this choice. “show all” shows all again."
                                                      : "This evaluation has no records."});
  $("cards").replaceChildren(...(shown.length ? shown.map(index => cards[index]) : [none]));
  if (records.length <= EAGER) shown.forEach(fill);
  else for (const index of shown) if (!cards[index].querySelector(".panels")) near.observe(cards[index]);
}

function summarise() {
  const means = runs.map((run, k) => {
    const sum = shown.reduce((total, index) => total + records[index].scores[k].dsc, 0);
    return `${SINGLE ? "" : run + ": "}mean DSC ${shown.length ? percent(sum / shown.length) : "undefined"}`;
  });
  $("summary").textContent = `${shown.length} of ${records.length} records; ${means.join("; ")}`;
}

function makeHistogram() {
  for (let k = 0; k < BINS; k++) {
    const bar = make("button", {type: "button"}, make("span"), make("i"));
    bar.addEventListener("click", () => { bin = bin === k ? null : k; change(); });
    $("histogram").append(bar);
  }
}

function drawHistogram(fitting) {
  const counts = Array(BINS).fill(0);
  for (const index of fitting) counts[binOf(records[index])]++;
  const most = Math.max(...counts);
  [...$("histogram").children].forEach((bar, k) => {
    const [number, column] = bar.children;
    bar.disabled = !counts[k] && bin !== k;  // the chosen one can always be given back
    bar.title = bar.ariaLabel = `DSC ${100 * k / BINS} to ${100 * (k + 1) / BINS} %: ${counts[k]} records`;
    bar.setAttribute("aria-pressed", bin === k);
    number.textContent = counts[k] || "";
    column.style.height = counts[k] ? `${Math.max(2, 62 * counts[k] / most)}px` : 0;
  });
}

function addOptions(id, values, describe = value => value) {
  for (const value of values) $(id).append(make("option", {value, textContent: describe(value)}));
  $(id).parentElement.hidden = values.length < 2;
}

function fillSelects() {
  const distinct = values => [...new Set(values)].filter(Boolean).sort((a, b) => a.localeCompare(b, undefined, {numeric: true}));
  addOptions("class", distinct(records.map(record => record.class_word)));
  const groups = distinct(records.map(record => record.group));
  addOptions("group", groups.length < records.length ? groups : []);
  const [low, high] = limits.map(limit => percent(limit));
  const ranges = {small: `below ${low}`, medium: `${low} to ${high}`, large: `from ${high}`};
  addOptions("size", limits[0] < limits[1] ? SIZES : [], size => `${size}: ${ranges[size]} of the image`);
  const counts = new Map();
  for (const record of records)
    for (const prompt of new Set(record.scores.map(score => score.prompt))) counts.set(prompt, (counts.get(prompt) ?? 0) + 1);
  const frequent = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, 200);
  addOptions("prompt", frequent, prompt => `${prompt.slice(0, 60)} (${counts.get(prompt)})`);
}

function clear() {
  for (const id of CONTROLS) if (!["a", "b", "sort"].includes(id)) $(id).value = $(id).dataset.start;
  bin = null;
  change();
}

function change() {
  update();
  remember();
}

// The address holds the choice and the open record, so that both can be linked, and Back closes a record

function address() {
  const state = new URLSearchParams();
  for (const id of CONTROLS) if (value(id) !== $(id).dataset.start) state.set(id, value(id));
  if (bin !== null) state.set("bin", bin);
  if (at >= 0) state.set("open", shown[at]);
  return "#" + state;
}

function remember() {
  // Some browsers refuse this for files: then nothing is remembered.
  try { history.replaceState(history.state, "", address()); } catch { /* as above */ }
}

function rememberOpening() {
  try {
    history.scrollRestoration = "manual";  // the page stays where it is when Back closes the record
    history.pushState({opened: true}, "", address());
  } catch { /* as above */ }
}

function restore() {
  if (leaving) {
    leaving = false;
    if (at >= 0) rememberOpening();  // another record was opened in the meantime
    return;
  }
  const state = new URLSearchParams(location.hash.slice(1));
  for (const id of CONTROLS) {
    $(id).value = state.get(id) ?? $(id).dataset.start;
    if ($(id).selectedIndex === -1) $(id).value = $(id).dataset.start;  // an option that is not there
  }
  const chosen = Number(state.get("bin") || NaN);
  bin = Number.isInteger(chosen) && chosen >= 0 && chosen < BINS ? chosen : null;
  update();
  const position = state.has("open") ? shown.indexOf(Number(state.get("open") || NaN)) : -1;
  if (position >= 0) open(position, false);
  else if (at >= 0) close();
}

// One record

function open(position, push = true) {
  if (position < 0 || position >= shown.length) return;
  const first = !$("detail").open;
  const other = at !== position;
  at = position;
  if (first) openedAt = at;
  if (first || other) showRecord(records[shown[at]]);
  if (first) $("detail").showModal();
  if (leaving) return;
  if (first && push) rememberOpening(); else remember();
}

function showRecord(record) {
  $("heading").textContent = record.image;
  $("place").textContent = `${at + 1} of ${shown.length}`;
  tellSource(record, true);
  $("large").replaceChildren(words(record, true), panels(record, true));
  for (const image of $("large").querySelectorAll("img")) image.addEventListener("load", applyZoom);
  zoomTo(1, 0, 0);
}

function tellSource(record, reachable) {
  if (at < 0 || record !== records[shown[at]]) return;
  const small = Math.max(record.width, record.height) > side;
  const note = record.original ? "The original image is not where it was when this page was written." : "";
  $("source").replaceChildren(`${record.width} x ${record.height} pixels. `);
  if (record.original && reachable) $("source").append(make("a", {href: record.original, textContent: "original image"}));
  else if (small) $("source").append(note, " It is shown reduced; evaluate.py --gallery-full writes originals beside the page.");
}

function close() {
  const card = cards[shown[at]];
  const moved = at !== openedAt;
  at = -1;
  $("large").classList.remove("blink");
  $("detail").close();
  leaving = Boolean(history.state?.opened);
  if (leaving) history.back(); else remember();
  card?.querySelector("button").focus({preventScroll: true});
  if (moved) card?.scrollIntoView({block: "nearest"});
}

// Zoom: all panels show the same part. x, y: where the image's corner lies, in widths and heights of a panel

const view = {zoom: 1, x: 0, y: 0};

function panelWidth() {
  return $("large").querySelector(".stack")?.clientWidth || 1;
}

function zoomTo(zoom, x, y) {
  const most = Math.max(8, 8 * pixelZoom());
  view.zoom = Math.min(most, Math.max(1, zoom));
  view.x = Math.min(0, Math.max(1 - view.zoom, x));
  view.y = Math.min(0, Math.max(1 - view.zoom, y));
  applyZoom();
}

function zoomBy(factor, u = 0.5, v = 0.5) {  // the point (u, v) of a panel stays where it is
  const zoom = Math.max(1, view.zoom * factor);
  const grown = zoom / view.zoom;
  zoomTo(zoom, u - (u - view.x) * grown, v - (v - view.y) * grown);
}

function pixelZoom() {  // at which one pixel of the image is one of the screen
  return records[shown[at]].width / panelWidth() / devicePixelRatio;
}

function applyZoom() {
  if (at < 0) return;
  const ratio = view.zoom / pixelZoom();
  for (const name of ["zoom", "x", "y"]) $("large").style.setProperty("--" + name, view[name]);
  $("large").classList.toggle("enlarged", view.zoom > 1);
  $("large").classList.toggle("pixels", ratio >= 1);
  $("scale").textContent = `zoom ${view.zoom.toFixed(1)}; ${ratio.toFixed(2)} screen pixels for an image pixel`;
}

function toPixels() {
  zoomBy(pixelZoom() / view.zoom);
}

function pan(dx, dy) {  // in panels
  zoomTo(view.zoom, view.x + dx, view.y + dy);
}

const fingers = new Map();  // pointers that are down: their last places

function pointerPlace(event) {
  const area = event.target.closest(".stack").getBoundingClientRect();
  return {u: (event.clientX - area.x) / area.width, v: (event.clientY - area.y) / area.height};
}

function press(event) {
  const box = event.target.closest(".stack");
  if (!box) return;
  box.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, pointerPlace(event));
  blink(box.querySelector(".instead") && fingers.size === 1);
}

function drag(event) {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const now = pointerPlace(event);
  const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
  if (other) {
    const apart = place => Math.hypot(place.u - other.u, place.v - other.v) || 1e-3;
    zoomBy(apart(now) / apart(last), (now.u + other.u) / 2, (now.v + other.v) / 2);
  } else if (view.zoom > 1) {
    pan(now.u - last.u, now.v - last.v);
  }
  fingers.set(event.pointerId, now);
}

function release(event) {
  fingers.delete(event.pointerId);
  blink(false);
}

function wheel(event) {
  const box = event.target.closest(".stack");
  if (!box || view.zoom === 1 && event.deltaY > 0) return;  // a whole image lets the page scroll
  event.preventDefault();
  const {u, v} = pointerPlace(event);
  zoomBy(Math.exp(-event.deltaY / 400), u, v);
}

function blink(on) {
  $("large").classList.toggle("blink", Boolean(on));
  for (const caption of $("large").querySelectorAll("figcaption"))
    if (caption.parentElement.querySelector(".instead")) caption.textContent = on ? "ground truth" : caption.title;
}

// Drawing: the layers' areas have half alpha, their contours full alpha; a filter puts the chosen fill in its place

function drawMasks() {
  const fill = $("contour").checked ? 0 : $("opacity").value / 100;
  $("alpha").setAttribute("tableValues", `0 ${fill} 1`);
}

function changeFill(step) {
  $("opacity").value = +$("opacity").value + step;
  drawMasks();
}

// The records shown, as a table for other programs

function cell(value) {
  let text = String(value ?? "");
  // Spreadsheets would take a name that begins so for a formula.
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const MEASURES = ["prompt", "dsc", "iou", "hd95", "nsd", "unit"];
  const titles = runs.flatMap((_, k) => MEASURES.map(name => ofRun(name, k)));
  const rows = [["image", "mask", "class", "group", "share_of_image", ...titles]];
  for (const index of shown) {
    const record = records[index];
    const values = record.scores.flatMap(score => MEASURES.map(name => score[name]));
    rows.push([record.image, record.mask, record.class_word, record.group, record.size, ...values]);
  }
  return rows.map(row => row.map(cell).join(",") + "\n").join("");
}

async function copy() {
  let copied = true;
  try { await navigator.clipboard.writeText(csv()); } catch { copied = copyOldWay(csv()); }
  $("summary").textContent = copied ? `Copied ${shown.length} records.` : "The browser does not let this page copy; save the file.";
}

function copyOldWay(text) {  // for pages that a browser trusts less
  const area = make("textarea", {value: text});
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  $("copy").focus();
  return copied;
}

function save() {
  const url = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  make("a", {href: url, download: "records.csv"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Keys

const STEPS = {ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1};
const ARROWS = {ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
const ANYWHERE = {
  "?": () => $("keys").showModal(),
  "c": () => { $("contour").checked = !$("contour").checked; drawMasks(); },
  "[": () => changeFill(-10),
  "]": () => changeFill(10),
};
const IN_RECORD = {
  "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5),
  "0": () => zoomTo(1, 0, 0), "1": toPixels, "b": () => blink(true),
};

function stepFocus(step) {
  const here = shown.indexOf(Number(document.activeElement.closest("article")?.dataset.index ?? -1));
  cards[shown[Math.max(0, here + step)]]?.querySelector("button").focus();
}

function keydown(event) {
  const {key} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.matches("select, [type=search], [type=range]")) return;
  if (key.length === 1 && !$("characters").checked) return;
  const inRecord = $("detail").open;
  let action = ANYWHERE[key] ?? (inRecord ? IN_RECORD[key] : undefined);
  if (STEPS[key]) action = inRecord ? () => open(at + STEPS[key]) : () => stepFocus(STEPS[key]);
  if (inRecord && event.shiftKey && ARROWS[key]) action = () => pan(...ARROWS[key].map(way => way / 8));
  if (!action) return;
  event.preventDefault();
  action();
}

function holdButton(event) {  // of "hold": Space or Enter do what the mouse does
  if (event.key === " " || event.key === "Enter") blink(event.type === "keydown");
}

// Start

function onClick(actions) {
  for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", () => action());
}

function listen() {
  for (const id of CONTROLS) $(id).addEventListener("input", change);
  for (const id of ["contour", "opacity"]) $(id).addEventListener("input", drawMasks);
  $("controls").addEventListener("submit", event => event.preventDefault());
  onClick({clear, copy, save, print: printAll, pixels: toPixels, close,
           previous: () => open(at - 1), next: () => open(at + 1), closer: () => zoomBy(1.5),
           farther: () => zoomBy(1 / 1.5), fit: () => zoomTo(1, 0, 0)});
  for (const button of document.querySelectorAll(".help")) button.addEventListener("click", ANYWHERE["?"]);
  for (const dialog of document.querySelectorAll("dialog"))
    dialog.addEventListener("click", event => { if (event.target === dialog && beside(dialog, event)) dialog === $("detail") ? close() : dialog.close(); });
  $("detail").addEventListener("close", () => { if (at >= 0 && !$("detail").open) close(); });  // by Escape
  const large = $("large");
  large.addEventListener("pointerdown", press);
  large.addEventListener("pointermove", drag);
  for (const end of ["pointerup", "pointercancel"]) large.addEventListener(end, release);
  large.addEventListener("wheel", wheel, {passive: false});
  large.addEventListener("dblclick", event => {
    if (!event.target.closest(".stack")) return;
    const {u, v} = pointerPlace(event);
    zoomBy(2, u, v);
  });
  large.addEventListener("contextmenu", event => { if (fingers.size) event.preventDefault(); });
  for (const start of ["pointerdown", "keydown"]) $("blink").addEventListener(start, event => start === "keydown" ? holdButton(event) : blink(true));
  for (const end of ["pointerup", "pointerleave", "blur"]) $("blink").addEventListener(end, () => blink(false));
  addEventListener("keydown", keydown);
  addEventListener("keyup", () => blink(false));
  addEventListener("resize", applyZoom);
  addEventListener("beforeprint", preparePrint);
  for (const moved of ["popstate", "hashchange"]) addEventListener(moved, restore);
}

function beside(dialog, event) {
  const area = dialog.getBoundingClientRect();
  return event.clientX < area.left || event.clientX > area.right || event.clientY < area.top || event.clientY > area.bottom;
}

function start() {
  showMeans();
  fillSelects();
  cards.push(...records.map(makeCard));
  makeHistogram();
  for (const id of CONTROLS) $(id).dataset.start = value(id);
  listen();
  drawMasks();
  restore();
  document.body.dataset.ready = Math.round(performance.now() - started);
}

start();
