// The page: a WebSocket in, frames on a canvas at the video's own rate, and controls out.
import { JitterBuffer } from "./buffer.js";

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const screen = $("screen"), brush = screen.getContext("2d");
let socket, hello, buffer, take = 0, pressed = 0, first = true, playing = false, lastAck = 0, arrivals = [], picture = false;

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
      buffer.clear();
      arrivals = [];
      setPlaying(true);
      return showSchedule(message);
    case "schedule": return showSchedule(message);
    case "said": return say(`From the next chunk on: ${message.prompt}`);
    case "stopped": buffer.clear(); setPlaying(false); return say("Stopped.");
    case "end": case "idle": setPlaying(false); return say(message.message);
    case "error":
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
  const token = query.get("token") ? `?token=${encodeURIComponent(query.get("token"))}` : "";
  $("start").hidden = !hello.image;
  if (!hello.trained_image_start) $("image-hint").textContent += "; this model was not trained for it";
  for (const kind of ["mp4", "json"]) $(kind).dataset.href = `clip/${hello.visitor}.${kind}${token}`;
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
    $(kind).href = $(kind).dataset.href;
    $(kind).removeAttribute("aria-disabled");
  }
  // decoding is started for all, and they enter the buffer in order
  buffer.push(frames.map((blob) => createImageBitmap(blob)), { head });
}

function addThumb(head, blob) {
  for (const old of [...$("strip").children]) if (Number(old.dataset.chunk) >= head.chunk) drop(old);
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
  $("strip").append(item);
  while ($("strip").children.length > 60) drop($("strip").firstChild);
  item.scrollIntoView({ block: "nearest", inline: "end" });
}

function drop(item) {
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
}

function rewind(head) {
  if (head.chunk === 0) return $("form").requestSubmit();
  pressed = performance.now();
  first = true;
  const prompt = $("prompt").value.trim(), seed = Number($("seed").value);
  send({ type: "rewind", chunk: head.chunk, ...(prompt && prompt !== head.prompt && { prompt }), ...(seed !== head.seed && { seed }) });
  say(`Going on from chunk ${head.chunk}.`);
}

function draw(now) {
  requestAnimationFrame(draw);
  const frame = buffer.next(now);
  if (frame) {
    brush.drawImage(frame.image, 0, 0);
    frame.image.close();
    if (first) {
      first = false;
      $("latency").value = (performance.now() - pressed).toFixed(0);
      say(`Playing: ${frame.head.prompt}`);
    }
    if (screen.dataset.prompt !== frame.head.prompt) {
      screen.dataset.prompt = frame.head.prompt;
      screen.setAttribute("aria-label", `Video of: ${frame.head.prompt}`);
      if (frame.head.chunk) say(`Playing: ${frame.head.prompt}`);
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
  pressed = performance.now();
  first = true;
  buffer.stalls = 0;
  [...$("strip").children].forEach(drop);
  send({ type: "play", prompt: $("prompt").value, seed: Number($("seed").value), steps: steps(), context: $("context").value, image: picture });
  say("Making the first frames …");
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
