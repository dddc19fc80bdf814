// The operator's page. What comes from files or from the service enters the document as text, never as markup. URLs are
// relative to the page's own, so that it also works behind a proxy's path prefix.

const RETRIES = 5; // of a request that the service was too busy for
const KEPT = 20; // images in the history, until the operator asks for older ones
const TILE = 112; // pixels of a thumbnail's side, twice what the style sheet shows, for sharp screens

const WORDS = {
  normal: "Normal",
  review: "Review",
  anomalous: "Anomalous",
  none: "No verdict",
  failed: "Not checked",
  working: "Checking…",
};
const SIGNS = {
  normal: "M4 12.5 9.5 18 20 6.5",
  review: "M2 12s3.7-6.5 10-6.5S22 12 22 12s-3.7 6.5-10 6.5S2 12 2 12ZM9 12a3 3 0 1 0 6 0 3 3 0 1 0-6 0",
  anomalous: "M12 3 22.4 21H1.6ZM12 9.5v5M12 17.4v.6",
  none: "M5 12h14",
  failed: "M8 9a4 4 0 1 1 5.5 3.7c-1 .5-1.5 1.2-1.5 2.3M12 18.4v.6",
  working: "M12 7v5.5l3.5 2M12 3a9 9 0 1 0 .1 0",
};

const $ = (id) => document.getElementById(id);
const digits = new Intl.NumberFormat("en", {
  minimumSignificantDigits: 4,
  maximumSignificantDigits: 4,
  useGrouping: false,
});
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

/** Something went wrong; the message is a sentence for the operator. */
class Problem extends Error {
  constructor(sentence, code = null) {
    super(sentence);
    this.code = code;
  }
}

function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// ---- The service

let key = null; // in memory only
let unlocking = null; // what waits for a key to be typed

/** Ask the service; come back with an answer, or throw a Problem. Waits for a key, and for a busy service. */
async function ask(path, options = {}) {
  for (let tries = 1; ; ) {
    const sent = key;
    let response;
    try {
      response = await fetch(path, { ...options, headers: sent === null ? {} : { "X-API-Key": sent } });
    } catch {
      throw new Problem("The service cannot be reached, or it broke the connection off.");
    }
    if (response.ok) {
      if (sent !== null && sent === key) $("key-form").hidden = true;
      return response;
    }
    if (response.status === 401) {
      if (sent === key) await askForKey(); // else another request has got one meanwhile
      continue;
    }
    const pause = response.status === 503 ? response.headers.get("Retry-After") : null; // without it, waiting is no use
    if (pause === null || tries > RETRIES) throw await problemOf(response);
    const seconds = Math.min(Math.max(Number(pause) || 1, 0.1), 60);
    $("status").textContent = `The service is busy; trying again in ${seconds} s (${tries} of ${RETRIES}).`;
    tries += 1;
    await sleep(seconds);
  }
}

async function read(response) {
  try {
    return await response.json();
  } catch {
    throw new Problem("The service's answer cannot be read.");
  }
}

async function problemOf(response) {
  const { detail, code } = await response.json().catch(() => ({})); // a proxy in between may answer anything
  return typeof detail === "string" ? new Problem(detail, code) : new Problem(`The service answered ${response.status}.`);
}

function askForKey() {
  unlocking ??= new Promise((unlock) => {
    const before = document.activeElement;
    $("key-note").textContent = key === null ? "The service asks for its key." : "The service does not take this key.";
    $("key-form").hidden = false;
    $("key").select();
    $("key").focus();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const typed = $("key").value.trim();
      try {
        new Headers({ "X-API-Key": typed });
      } catch {
        $("key-note").textContent = "A key cannot have these characters.";
        return;
      }
      key = typed;
      unlocking = null;
      $("key-note").textContent = "";
      before?.focus();
      unlock();
    };
  });
  return unlocking;
}

const deep = new Set(); // names of the models whose images a browser would show too dark, or clipped
const promises = new Map(); // what the thresholds of a model promise, by its name

async function loadModels() {
  const { models, default: first, record } = await read(await ask("../models"));
  recording = record;
  deep.clear();
  for (const { name, intensity_range: range, promise } of models) {
    if (range) deep.add(name);
    promises.set(name, promise ?? "");
  }
  const before = $("model").value;
  const options = models.map(({ name, problem }) => {
    const option = make("option", problem ? `${name} (cannot be served)` : name);
    option.title = problem ?? "";
    option.value = name;
    option.disabled = Boolean(problem);
    return option;
  });
  if (first === null) {
    const none = make("option", "Choose a model…");
    none.value = "";
    options.unshift(none);
  }
  $("model").replaceChildren(...options);
  $("models").hidden = models.length < 2;
  $("model").value = models.some(({ name }) => name === before) ? before : (first ?? "");
  if (models.length === 0) throw new Problem("The service has no model yet.");
}

const chosenModel = () => ($("models").hidden ? "" : $("model").value);

async function loadSamples() {
  const names = await read(await ask("../samples"));
  const path = (name) => `../samples/${encodeURIComponent(name)}`;
  const fetched = async (name) => (await ask(path(name))).blob();
  const tiles = names.map((name) => {
    const button = make("button", name.split(".").pop(), "tile");
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", name);
    button.addEventListener("click", () => check([{ name, read: () => fetched(name) }]));
    const item = make("li");
    item.append(button);
    return [name, button, item];
  });
  $("sample-list").replaceChildren(...tiles.map(([, , item]) => item));
  $("samples").hidden = names.length === 0;
  for (const [name, button] of tiles) {
    const picture = await fetched(name).then(thumbnail, () => null); // one at a time: images to check go first
    if (picture) button.replaceChildren(picture);
  }
}

/** A small canvas of an image, or null where the browser cannot read it. A canvas needs no URL that must be freed. */
async function thumbnail(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return null;
  }
  const side = Math.min(bitmap.width, bitmap.height);
  const canvas = make("canvas");
  canvas.width = canvas.height = TILE;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, TILE, TILE);
  bitmap.close();
  return canvas;
}

// ---- Checking images, one after the other

const waiting = [];
let working = false;

/** Put images, each with a name and a way to read it, in line. */
async function check(images) {
  const model = chosenModel();
  waiting.push(...images.map((image) => ({ ...image, model })));
  if (working) return;
  working = true;
  const counts = {};
  let image;
  while ((image = waiting.shift())) {
    $("status").textContent = `Checking ${image.name}${waiting.length ? `, ${waiting.length} more waiting` : ""}`;
    $("stop").hidden = waiting.length === 0;
    const slow = setTimeout(showWorking, 150, image.name); // an old verdict must not stand for the new image
    const entry = await answerFor(image);
    clearTimeout(slow);
    const state = stateOf(entry);
    counts[state] = (counts[state] ?? 0) + 1;
    await remember(entry);
    show(entry);
  }
  working = false;
  $("stop").hidden = true;
  const parts = Object.entries(counts).map(([state, count]) => `${count} ${WORDS[state].toLowerCase()}`);
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
  $("status").textContent = total > 1 ? `${total} images: ${parts.join(", ")}` : "";
}

async function answerFor({ name, read: bytes, model }) {
  try {
    const blob = await bytes();
    const form = new FormData();
    form.append("image", blob, name);
    form.append("heatmap", "true");
    if (model) form.append("model", model);
    const { heatmap, ...answer } = await read(await ask("../predict", { method: "POST", body: form }));
    return { name, blob, answer, heatmap: heatmap ? fromBase64(heatmap) : null };
  } catch (error) {
    if (!(error instanceof Problem)) console.error(error);
    if (error.code === "model_unknown") loadModels().catch(complain); // it has been taken away
    return { name, problem: error instanceof Problem ? error.message : `The page failed: ${error.message}` };
  }
}

function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

/** A file to check. It is copied when its turn comes: cameras like to write the next image over the last one. */
function fromFile(file) {
  const copy = async () => {
    try {
      return new Blob([await file.arrayBuffer()], { type: file.type });
    } catch {
      throw new Problem(`${file.name} cannot be read from the disk. If it is a folder, drop the images in it.`);
    }
  };
  return { name: file.name, read: copy };
}

// ---- History

const past = []; // the newest first
let kept = KEPT;
let recording = false; // whether the service keeps a record

/** Put an image that was just checked at the top of the history. */
async function remember(entry) {
  entry.time = new Date();
  const picture = entry.heatmap ? await thumbnail(entry.heatmap) : null;
  past.unshift(entry);
  $("history").prepend(itemOf(entry, picture)); // the others stay in place, and so does the focus
  if (past.length > kept) {
    past.pop().button.parentElement.remove();
    $("older").hidden = !recording;
  }
  $("history-none").hidden = true;
}

function itemOf(entry, picture) {
  const button = make("button", "", "entry");
  button.type = "button";
  const state = stateOf(entry);
  const score = entry.answer ? digits.format(entry.answer.score) : "";
  const text = make("span", "", "text");
  const name = make("span", entry.name, "name");
  name.title = `${entry.name}, ${entry.time.toLocaleString()}`;
  entry.spoken = make("span", "", "spoken");
  text.append(name, make("span", `${WORDS[state]} ${score}`, `state ${state}`), entry.spoken);
  button.append(picture ?? make("span", entry.problem ? "?" : "", "no-picture"), text);
  button.addEventListener("click", () => show(entry));
  entry.button = button;
  showSpoken(entry);
  const item = make("li");
  item.append(button);
  return item;
}

/** Add older answers, from the service's record, at the end of the history. */
async function loadOlder() {
  const last = past.findLast(({ answer }) => answer?.record);
  const before = last ? `&before=${last.answer.record}` : "";
  const { answers, next } = await read(await ask(`../history?limit=${KEPT}${before}`));
  $("older").hidden = next === null;
  const known = new Set(past.map(({ answer }) => answer?.record)); // one was checked meanwhile
  const entries = answers
    .filter(({ record }) => !known.has(record))
    .map(({ name, answer, time, feedback: said, image: stored }) => ({ name, answer, time: new Date(time), said, stored }));
  past.push(...entries);
  kept = Math.max(kept, past.length);
  $("history").append(...entries.map((entry) => itemOf(entry, null)));
  $("history-none").hidden = past.length > 0;
  for (const entry of entries.filter(({ stored }) => stored)) {
    const picture = await recordedImage(entry).then(thumbnail, () => null); // one at a time: images to check go first
    if (picture) entry.button.firstElementChild.replaceWith(picture);
  }
}

const recordedImage = async ({ answer }) => (await ask(`../history/${answer.record}/image`)).blob();

function showSpoken({ said, spoken }) {
  spoken.textContent = said ? `said to be ${said.word}` : "";
}

const stateOf = ({ problem, answer }) => (problem ? "failed" : (answer.verdict ?? "none"));

// ---- The result

const urls = []; // of the images that are shown

function urlOf(blob) {
  urls.push(URL.createObjectURL(blob));
  return urls.at(-1);
}

function showState(state, name) {
  $("empty").hidden = true;
  $("result").hidden = false;
  $("result").dataset.state = state;
  $("sign").setAttribute("d", SIGNS[state]);
  $("word").textContent = WORDS[state];
  $("name").textContent = name;
}

function showWorking(name) {
  showState("working", name);
  current = null;
  $("feedback").hidden = true;
  $("problem").textContent = "";
}

let current = null; // the entry that is shown

function show(entry) {
  const { name, answer, problem } = entry;
  current = entry;
  showState(stateOf(entry), name);
  $("problem").textContent = problem ?? "";
  for (const one of past) {
    if (one === entry) one.button.setAttribute("aria-current", "true");
    else one.button.removeAttribute("aria-current");
  }
  const parts = [WORDS[stateOf(entry)], answer && `score ${digits.format(answer.score)}`, name];
  $("said").textContent = parts.filter(Boolean).join(", ");
  for (const part of ["scoring", "details"]) $(part).hidden = !answer;
  $("pictures").hidden = !entry.blob;
  $("feedback").hidden = !answer?.record;
  urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  if (!answer) return;
  showScore(answer);
  if (entry.blob) showPictures(entry);
  else if (entry.stored) showRecorded(entry).catch(complain);
  showDetails(answer);
  $("answered").textContent = entry.time.toLocaleString();
  $("note").value = entry.said?.note ?? "";
  $("feedback-note").textContent = "";
  showWord(entry);
}

/** Show the image of an answer that comes from the record, which has no heatmap. */
async function showRecorded(entry) {
  const blob = await recordedImage(entry);
  if (current !== entry) return; // the operator has gone on
  $("pictures").hidden = false;
  showPictures({ ...entry, blob, heatmap: null });
}

function showScore({ score, threshold, review_threshold: review, ratio, normalized_score: normalized, p_value: p }) {
  $("score").textContent = digits.format(score);
  $("threshold").textContent = threshold === null ? "no threshold" : digits.format(threshold);
  $("review-threshold").textContent = review === null ? "" : digits.format(review);
  $("review-item").hidden = review === null;
  $("ratio").textContent = ratio === null ? "" : `${(100 * ratio).toFixed(1)} %`;
  $("ratio-item").hidden = ratio === null;
  $("normalized").textContent = normalized === null ? "" : normalized.toFixed(3);
  $("normalized-item").hidden = normalized === null;
  $("p-value").textContent = p === null ? "" : p.toFixed(3);
  $("p-value-item").hidden = p === null;
  $("meter").hidden = threshold === null;
  if (threshold === null) return;
  const end = Math.max(2 * threshold, 1.1 * score) || 1; // the mark stays in the middle as long as there is room
  $("bar").style.width = `${(100 * score) / end}%`;
  $("mark").style.left = `${(100 * threshold) / end}%`;
  $("review-mark").hidden = review === null;
  if (review !== null) $("review-mark").style.left = `${(100 * review) / end}%`;
  $("meter").setAttribute("aria-valuenow", score);
  $("meter").setAttribute("aria-valuemax", end);
  $("meter").setAttribute("aria-valuetext", `${digits.format(score)}, threshold ${digits.format(threshold)}`);
}

function showPictures({ blob, heatmap, answer: { size, regions, model } }) {
  $("pictures").style.setProperty("--ratio", size.width / size.height);
  $("pictures").classList.toggle("wide", size.width > 2 * size.height);
  showBlind(deep.has(model));
  if (deep.has(model)) {
    for (const id of ["image", "under"]) $(id).removeAttribute("src");
  } else {
    $("image").src = $("under").src = urlOf(blob);
  }
  if (heatmap) $("heatmap").src = urlOf(heatmap);
  else $("heatmap").removeAttribute("src");
  $("heatmap").hidden = $("over-blind").hidden = !heatmap;
  $("no-heatmap").hidden = Boolean(heatmap);
  $("shade").hidden = !heatmap;
  const boxes = (regions ?? []).map(({ left, top, width, height }, index) => {
    const box = make("div", "", top < 0.08 * size.height ? "high" : ""); // no room for its number above
    box.append(make("span", index + 1));
    box.style.left = `${(100 * left) / size.width}%`;
    box.style.top = `${(100 * top) / size.height}%`;
    box.style.width = `${(100 * width) / size.width}%`;
    box.style.height = `${(100 * height) / size.height}%`;
    return box;
  });
  $("boxes").replaceChildren(...boxes);
}

/** Whether the browser cannot show the image's kind of file: the heatmap must stand alone then. */
function showBlind(blind) {
  $("image").hidden = $("under").hidden = blind;
  $("blind").hidden = !blind;
  $("opacity").disabled = blind;
  $("heatmap").style.opacity = blind ? 1 : $("opacity").value / 100;
}

function showDetails({ regions, small_regions: small, pixel_threshold: limit, milliseconds, model, version, size }) {
  const known = Boolean(regions?.[0]?.mm);
  $("mm-head").hidden = !known;
  const rows = (regions ?? []).map(({ left, top, width, height, area, peak, mm }, index) => {
    const row = make("tr");
    const cells = [index + 1, left, top, width, height, area, digits.format(peak)];
    if (known) cells.push(digits.format(mm.area));
    row.append(...cells.map((cell) => make("td", cell)));
    if (known) row.title = `${digits.format(mm.width)} × ${digits.format(mm.height)} mm`;
    return row;
  });
  $("regions").replaceChildren(...rows);
  $("regions-scroll").hidden = rows.length === 0;
  $("regions-note").textContent =
    regions === null
      ? "no threshold: the model was never validated"
      : `${rows.length || "No"} ${rows.length === 1 ? "region" : "regions"} above the pixel threshold ${digits.format(limit)}` +
        (small ? `, and ${small} smaller than the model's limit, not listed` : "");
  const total = Object.values(milliseconds).reduce((sum, time) => sum + time, 0);
  const times = Object.entries({ ...milliseconds, total }).map(([stage, time]) => {
    const item = make("div");
    item.append(make("dt", stage), make("dd", `${time.toFixed(1)} ms`));
    return item;
  });
  $("times").replaceChildren(...times);
  $("model-name").textContent = model;
  $("model-version").textContent = version;
  $("promise").textContent = promises.get(model) ?? "";
  $("image-size").textContent = `${size.width} × ${size.height}`;
}

// ---- The operator's word

let saying = Promise.resolve(); // one after the other: the last word counts

function showWord({ said }) {
  for (const word of ["good", "bad"]) $(`say-${word}`).setAttribute("aria-pressed", said?.word === word);
}

/** Record what the operator says of the part that is shown. The image goes along: the record may lack it. */
function say(word) {
  const [entry, note] = [current, $("note").value];
  const form = new FormData();
  form.append("record", entry.answer.record);
  form.append("word", word);
  form.append("note", note);
  if (entry.blob) form.append("image", entry.blob, entry.name);
  const send = async () => {
    const { image, ...said } = await read(await ask("../feedback", { method: "POST", body: form }));
    entry.said = said;
    showSpoken(entry);
    if (current !== entry) return;
    showWord(entry);
    $("problem").textContent = "";
    const lacking = image
      ? ""
      : " The model cannot learn from it, as the image is not stored: choose it on this page and say so again.";
    $("feedback-note").textContent = `Recorded: this part is ${said.word}.${lacking}`;
  };
  saying = saying.then(send).catch(complain);
}

function complain(error) {
  if (!(error instanceof Problem)) console.error(error);
  $("problem").textContent = error.message;
}

// ---- The operator

const checkFiles = (files) => check(Array.from(files, fromFile));

$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  checkFiles($("files").files);
  $("files").value = ""; // else choosing the same file again would change nothing
});
$("stop").addEventListener("click", () => {
  waiting.length = 0;
  $("stop").hidden = true;
});
$("opacity").addEventListener("input", () => {
  $("heatmap").style.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
});
$("boxes-shown").addEventListener("change", () => {
  $("boxes").hidden = !$("boxes-shown").checked;
});
for (const word of ["good", "bad"]) $(`say-${word}`).addEventListener("click", () => say(word));
$("feedback").addEventListener("submit", (event) => event.preventDefault()); // Enter in the note says nothing by itself
$("note").addEventListener("change", () => {
  if (current?.said) say(current.said.word);
});
$("older").addEventListener("click", () => loadOlder().catch(complain));
$("image").addEventListener("error", () => showBlind(true));

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping"); // else it only crossed an element
});
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("dropping");
  checkFiles(event.dataTransfer.files);
});

loadModels()
  .then(() => recording && loadOlder())
  .catch(complain);
loadSamples().catch(complain);
