// The page: one form, one stream or two side by side.
import { folder } from "./live.js";
import { Pane } from "./pane.js";
import { ScheduleForm } from "./schedule.js";

const $ = (id) => document.getElementById(id);
const SWITCH_HINTS = {
  recache: "A new prompt rewrites the window of the cache, so that nothing of the old text stays.",
  recache_window: "A new prompt rewrites the window of the cache, but not the first chunk that all later ones see.",
  blend: "The old text turns into the new one over some chunks.",
  cut: "Only the text changes; the cache keeps what the old one left.",
};
let hello = null, picture = null, reported = 0;
const panes = [], forms = []; // one of each, or two
const asked = new Map(); // stream's message id -> form whose cost was asked for

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

const control = (form) => ({ prompt: $("prompt").value.trim(), seed: Number($("seed").value), schedule: form.value });

function addPane() {
  const pane = new Pane($("pane"), {
    said: (text, wrong) => {
      say(text, wrong);
      if (wrong && !hello && text.includes("API key")) $("access").showModal();
    },
    changed: refresh,
    hello: welcome,
    schedule: (message) => asked.get(message.id)?.show(message),
  });
  pane.onTile = (header) => $("form").reportValidity() && pane.goBack(header, control(forms[panes.indexOf(pane)]));
  pane.$("full").onclick = () => fullScreen(pane);
  panes.push(pane);
  $("panes").append(pane.root);
  return pane;
}

async function welcome(pane, message) {
  if (hello) { // the second pane, or a connection that is made again
    refresh();
    if (picture) await pane.stream.upload(picture).catch((error) => say(error.message, true));
    if (pane.next) pane.play(pane.next);
    return;
  }
  hello = message;
  $("model").textContent = `${hello.model} on ${hello.device}, ${hello.width}×${hello.height} at ${hello.fps} frames a second`;
  $("prompt").maxLength = hello.limits.prompt;
  $("seed").max = hello.limits.seed;
  for (const text of hello.examples) $("examples").append(new Option(text, text));
  for (const name of hello.switches) $("switch").append(new Option(name, name, false, name === hello.switch));
  $("start").hidden = !hello.image;
  if (!hello.trained_image_start) $("image-hint").textContent += " This model was not trained for it.";
  $("switch").onchange();
  addForm();
  say("Write a prompt and press Play.");
  restore();
  $("prompt").value ||= hello.examples[0];
  requestAnimationFrame(draw);
}

function addForm(value = null) {
  const form = new ScheduleForm($("schedule"), hello, "Schedule", (one) => {
    const id = panes[0].stream.send("describe", { schedule: one.value });
    asked.delete([...asked].find(([, other]) => other === one)?.[0]);
    asked.set(id, one);
  });
  forms.push(form);
  $("schedules").append(form.root);
  if (value) form.value = value;
  else form.update();
}

function compare(on) {
  if (on === (panes.length === 2)) return;
  if (on) {
    addForm(hello.presets.includes("self_forcing") ? { preset: "self_forcing", context: "clean" } : { steps: [4] });
    addPane();
  } else {
    panes.pop().remove();
    forms.pop().root.remove();
  }
  forms.forEach((form, i) => (form.title = on ? `Schedule ${"AB"[i]}` : "Schedule"));
  for (const [i, pane] of panes.entries()) {
    pane.$("title").hidden = !on;
    pane.$("title").textContent = on ? "AB"[i] : "";
  }
  document.body.classList.toggle("comparing", on);
  $("compare").setAttribute("aria-pressed", on);
  refresh();
}

function refresh() {
  const playing = panes.some((pane) => pane.playing), paused = playing && panes.every((pane) => pane.paused || !pane.playing);
  $("change").disabled = $("pause").disabled = !playing;
  $("pause").textContent = paused ? "Resume" : "Pause";
  for (const pane of panes) for (const part of ["numbers", "chunks"]) pane.$(part).hidden = !pane.takes.size;
}

function pause(on) {
  for (const pane of panes) if (pane.playing) pane.pause(on);
  say(on ? "Paused." : "Playing.");
}

function fullScreen(pane) {
  if (document.fullscreenElement) return document.exitFullscreen();
  const screen = pane.screen.element;
  return (pane.$("picture").requestFullscreen?.() ?? screen.webkitEnterFullscreen?.());
}

function draw(now) {
  requestAnimationFrame(draw);
  for (const pane of panes) if (pane.screen) pane.tick(now);
  if (now - reported < 200) return;
  reported = now;
  for (const pane of panes) if (pane.screen) pane.report(now);
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (!panes.every((pane) => pane.hello)) return;
  say("Making the first frames …");
  panes.forEach((pane, i) => pane.play({ ...control(forms[i]), image: Boolean(picture) }));
  panes[0].screen.element.scrollIntoView({ block: "nearest" });
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.target.closest("input, textarea, select, button, a") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && !$("pause").disabled) { event.preventDefault(); $("pause").click(); }
  else if (event.key.toLowerCase() === "f" && panes[0].screen) fullScreen(panes[0]);
};
$("pause").onclick = () => pause($("pause").textContent === "Pause");
$("change").onclick = () => {
  if (!$("form").reportValidity()) return;
  const changed = panes.map((pane, i) => pane.playing && pane.change({ ...control(forms[i]), switch: $("switch").value }));
  say(changed.some(Boolean) ? "The next chunk will show it …" : "Nothing in the form differs from what plays.");
};
$("switch").onchange = () => { $("switch-hint").textContent = SWITCH_HINTS[$("switch").value] ?? ""; };
$("examples").onchange = () => { if ($("examples").value) $("prompt").value = $("examples").value; };
$("compare").onclick = () => compare(panes.length < 2);

// What the page shows is in the address after `#`, which is not sent to the server. An API key is not part of it.
function link() {
  const state = new URLSearchParams({ prompt: $("prompt").value, seed: $("seed").value });
  for (const form of forms) state.append("schedule", JSON.stringify(form.value));
  return `${location.origin}${location.pathname}#${state}`;
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  $("prompt").value = (state.get("prompt") ?? "").slice(0, hello.limits.prompt);
  if (/^\d+$/.test(state.get("seed") ?? "")) $("seed").value = Math.min(Number(state.get("seed")), hello.limits.seed);
  try {
    const [first, second] = state.getAll("schedule").map((text) => Object(JSON.parse(text)));
    if (first) forms[0].value = first;
    if (second) { compare(true); forms[1].value = second; }
  } catch {
    say("The link's schedule cannot be read; the model's own is used.", true);
  }
}

$("share").onclick = async () => {
  const address = link();
  history.replaceState(null, "", `${location.pathname}${location.search}${new URL(address).hash}`);
  try {
    await navigator.clipboard.writeText(address);
    say("The link is copied.");
  } catch {
    say("The link is in the address bar.");
  }
};

// A browser's WebSocket cannot send an API key: it is exchanged for a cookie.
$("access").onsubmit = async (event) => {
  event.preventDefault();
  const headers = { Authorization: `Bearer ${$("key").value}` };
  const answer = await fetch(`${folder}session`, { method: "POST", headers }).catch(() => null);
  if (answer?.ok) return location.reload();
  $("key-status").textContent = answer?.status === 401 ? "This key is not known here." : "The server did not answer; try again.";
};

function usePicture(file) {
  picture = file;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = $("no-image").hidden = !file;
  if (file) $("preview").src = URL.createObjectURL(file);
  else { $("preview").removeAttribute("src"); $("image").value = ""; }
}

$("image").onchange = async () => {
  const [file] = $("image").files;
  if (!file) return;
  try {
    const most = hello.limits.image;
    if (file.size > most) throw new Error(`The picture has more than ${most / 2 ** 20} MiB; make it smaller.`);
    await Promise.all(panes.map((pane) => pane.stream.upload(file)));
    usePicture(file);
    say("The next video begins with this picture. Press Play.");
  } catch (error) {
    usePicture(null);
    say(error.message, true);
  }
};
$("no-image").onclick = () => { usePicture(null); say("The next video begins without a picture."); $("image").focus(); };
addPane();
