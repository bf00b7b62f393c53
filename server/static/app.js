// The page: a WebSocket in, frames on a canvas at the video's own rate, and controls out.
import { JitterBuffer } from "./buffer.js";

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const screen = $("screen"), brush = screen.getContext("2d");
let socket, hello, buffer, take = 0, playing = false, lastAck = 0, arrivals = [], picture = false;
let asked = []; // when the takes that have not begun were asked for, ms; frames until then are of the one before
let since = null; // when the take that plays was asked for, until its first frame is there

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const token = query.get("token");
  const folder = location.pathname.replace(/[^/]*$/, "");
  socket = new WebSocket(`${scheme}://${location.host}${folder}stream${token ? `?token=${encodeURIComponent(token)}` : ""}`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? heard(JSON.parse(data)) : gotChunk(data));
  socket.onclose = ({ reason }) => { setPlaying(false); say(reason || "The connection is closed; reload the page.", true); };
}

const send = (message) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));
const steps = () => [...$("sliders").querySelectorAll("input")].map((slider) => Number(slider.value));
const ask = () => send({ type: "schedule", steps: steps(), context: $("context").value });

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function setPlaying(on) {
  playing = on;
  $("stop").disabled = $("say").disabled = !on;
}

function heard(message) {
  switch (message.type) {
    case "hello": return begin(message);
    case "take":
      take = message.take;
      $("warnings").textContent = message.warnings.join(" ");
      since = asked.shift() ?? null;
      buffer.clear();
      arrivals = [];
      for (const row of [...$("strip").children]) if (!message.takes.includes(Number(row.dataset.take))) dropRow(row);
      addRow();
      setPlaying(true);
      return showSchedule(message);
    case "schedule": return showSchedule(message);
    case "said":
      $("warnings").textContent = message.warnings.join(" ");
      return say(`From the next chunk on: ${message.prompt}`);
    case "stopped": buffer.clear(); setPlaying(false); return asked.length || say("Stopped.");
    case "end": case "idle": setPlaying(false); return say(message.message);
    case "error":
      asked = [];
      if (message.over) setPlaying(false);
      return say(message.message, true);
  }
}

function begin(message) {
  hello = message;
  buffer = new JitterBuffer(hello.fps);
  screen.width = hello.width;
  screen.height = hello.height;
  $("model").textContent = `${hello.model} on ${hello.device}, ${hello.width}×${hello.height} at ${hello.fps} frames/s`;
  $("prompt").maxLength = hello.max_prompt;
  $("prompt").value ||= hello.examples[0];
  $("seed").max = hello.max_seed;
  for (const text of hello.examples) $("examples").append(new Option(text, text));
  for (const name of hello.contexts) $("context").append(new Option(name, name, false, name === hello.context));
  for (const name of hello.switches) $("switch").append(new Option(name, name, false, name === hello.switch));
  hello.steps.forEach(addSlider);
  $("start").hidden = !hello.image;
  if (!hello.trained_image_start) $("image-hint").textContent += "; this model was not trained for it";
  ask();
  say("Write a prompt and press Play.");
  requestAnimationFrame(draw);
}

function addSlider(value) {
  const rows = $("sliders"), k = rows.children.length;
  if (k >= hello.max_rows) return;
  const row = document.createElement("div"), label = document.createElement("label");
  const slider = document.createElement("input"), shown = document.createElement("output");
  row.className = "slider";
  Object.assign(slider, { type: "range", id: `steps-${k}`, min: 1, max: hello.max_steps, step: 1, value });
  label.htmlFor = slider.id;
  label.textContent = `Chunk ${k}`;
  shown.value = slider.value;
  slider.oninput = () => { shown.value = slider.value; ask(); };
  row.append(label, slider, shown);
  rows.append(row);
}

function showSchedule({ table, nfe, chunks, predicted_fps }) {
  $("table").textContent = table;
  $("nfe").value = `${nfe} network evaluations for ${chunks} chunks`;
  $("predicted-fps").value = predicted_fps === null ? "–" : predicted_fps.toFixed(1);
}

async function gotChunk(data) {
  const size = new DataView(data).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
  if (head.take !== take) return;
  let at = 4 + size;
  const [thumb, ...frames] = head.sizes.map((n) => {
    const blob = new Blob([new Uint8Array(data, at, n)], { type: "image/jpeg" });
    at += n;
    return blob;
  });
  arrivals.push([performance.now(), frames.length]);
  arrivals = arrivals.slice(-8);
  addThumb(head, thumb);
  for (const kind of ["mp4", "json"]) {
    $(kind).href = clip(kind, take);
    $(kind).removeAttribute("aria-disabled");
  }
  // decoding is started for all, and they enter the buffer in order
  buffer.push(frames.map((blob) => createImageBitmap(blob)), { head });
}

function clip(kind, of) {
  const token = query.get("token") ? `&token=${encodeURIComponent(query.get("token"))}` : "";
  return `clip/${hello.visitor}.${kind}?take=${of}${token}`;
}

// A row of thumbnails for each take: its own chunks, after those of the take that it went on from.
function addRow() {
  const row = document.createElement("section"), title = document.createElement("p");
  row.dataset.take = take;
  title.className = "hint";
  row.append(title, document.createElement("ol"));
  $("strip").append(row);
}

function nameRow(row, head) {
  const links = ["mp4", "json"].map((kind) => {
    const link = document.createElement("a");
    link.href = clip(kind, head.take);
    link.textContent = kind.toUpperCase();
    link.setAttribute("aria-label", `Download ${kind.toUpperCase()} of take ${head.take}`);
    return link;
  });
  const from = head.chunk ? `, on from chunk ${head.chunk}` : "";
  row.querySelector("p").append(`Take ${head.take}${from}: ${head.prompt} `, links[0], " ", links[1]);
}

function dropRow(row) {
  [...row.querySelectorAll("li")].forEach(drop);
  row.remove();
}

function addThumb(head, blob) {
  const row = $("strip").lastChild, list = row.querySelector("ol");
  if (!list.children.length) nameRow(row, head);
  const item = document.createElement("li"), button = document.createElement("button"), image = new Image();
  item.dataset.chunk = head.chunk;
  image.src = URL.createObjectURL(blob);
  image.alt = "";
  button.type = "button";
  button.disabled = !head.rewindable && head.chunk > 0;
  button.title = head.prompt;
  button.setAttribute("aria-label", `Go back to chunk ${head.chunk}: ${head.prompt}`);
  button.append(image, `${head.chunk} · ${(head.seconds * 1000).toFixed(0)} ms`);
  button.onclick = () => rewind(head);
  item.append(button);
  list.append(item);
  while (list.children.length > 60) drop(list.firstChild);
  list.scrollLeft = list.scrollWidth; // scrollIntoView would move the page, too
}

function drop(item) {
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
}

function rewind(head) {
  press(`Going on from chunk ${head.chunk} of take ${head.take} …`);
  const prompt = $("prompt").value.trim(), seed = Number($("seed").value);
  send({ type: "rewind", chunk: head.chunk, take: head.take, ...(prompt && prompt !== head.prompt && { prompt }), ...(seed !== head.seed && { seed }) });
}

function press(text) {
  asked.push(performance.now());
  $("latency").value = "–";
  say(text);
  screen.scrollIntoView({ block: "nearest" });
}

function draw(now) {
  requestAnimationFrame(draw);
  const frame = buffer.next(now);
  if (frame) {
    brush.drawImage(frame.image, 0, 0);
    frame.image.close();
    if (since !== null) {
      $("latency").value = (performance.now() - since).toFixed(0);
      since = null;
      say(`Playing: ${frame.head.prompt}`);
    }
    if (screen.dataset.prompt !== frame.head.prompt) {
      screen.dataset.prompt = frame.head.prompt;
      screen.setAttribute("aria-label", `Video of: ${frame.head.prompt}`);
      if (!asked.length) say(`Playing: ${frame.head.prompt}`);
    }
  }
  if (now - lastAck > 200) {
    lastAck = now;
    if (playing) send({ type: "shown", frames: buffer.shown });
    $("buffer").value = buffer.seconds.toFixed(1);
    $("stalls").value = buffer.stalls;
    $("shown-fps").value = buffer.rate(now).toFixed(1);
    if (arrivals.length > 1) {
      const span = arrivals.at(-1)[0] - arrivals[0][0];
      const made = arrivals.slice(1).reduce((sum, [, n]) => sum + n, 0);
      $("made-fps").value = ((1000 * made) / span).toFixed(1);
    }
  }
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  press("Making the first frames …");
  buffer.stalls = 0;
  send({ type: "play", prompt: $("prompt").value, seed: Number($("seed").value), steps: steps(), context: $("context").value, image: picture });
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
};
function usePicture(blob) {
  picture = Boolean(blob);
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = $("no-image").hidden = !picture;
  if (picture) $("preview").src = URL.createObjectURL(blob);
  else { $("preview").removeAttribute("src"); $("image").value = ""; }
}

async function upload(file) {
  if (file.size > hello.max_upload) throw new Error(`The picture has more than ${hello.max_upload / 2 ** 20} MiB; make it smaller.`);
  const token = query.get("token") ? `?token=${encodeURIComponent(query.get("token"))}` : "";
  const answer = await fetch(`image/${hello.visitor}${token}`, { method: "POST", body: file });
  if (!answer.ok) {
    const { detail } = await answer.json().catch(() => ({}));
    throw new Error(detail || `The picture was not taken (${answer.status}).`);
  }
}

$("image").onchange = async () => {
  const [file] = $("image").files;
  if (!file) return;
  try {
    await upload(file);
    usePicture(file);
    say("The next video begins with this picture. Press Play.");
  } catch (error) {
    usePicture(null);
    say(error.message, true);
  }
};
$("no-image").onclick = () => { usePicture(null); say("The next video begins without a picture."); $("image").focus(); };
$("say").onclick = () => send({ type: "say", prompt: $("prompt").value, switch: $("switch").value });
$("stop").onclick = () => send({ type: "stop" });
$("context").onchange = ask;
$("examples").onchange = () => { if ($("examples").value) $("prompt").value = $("examples").value; };
$("more").onclick = () => { addSlider(steps().at(-1)); ask(); };
$("fewer").onclick = () => { if ($("sliders").children.length > 1) { $("sliders").lastChild.remove(); ask(); } };
connect();
