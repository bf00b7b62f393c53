// One stream on the page: its picture, its figures, its chunks, and the takes that can be gone back to or downloaded.
import { LiveStream } from "./live.js";
import { JPEGScreen, MP4Screen, canPlay } from "./screens.js";

const FIXED = ["model", "mime", "fps", "height", "width"]; // of what `hello` says: a page is for these
const CHANGES = { set_prompt: "prompt", set_seed: "seed", set_schedule: "schedule" }; // what controls of what plays change
const MOST_TILES = 60, MOST_TAKES = 24; // on the page
const seconds = (n) => `${n.toFixed(1)} s`;

export class Pane {
  // changed(pane): its state is another; said(text, wrong): for the status line; hello(pane, message); schedule(message)
  constructor(template, { changed, said, hello, schedule }) {
    this.root = template.content.firstElementChild.cloneNode(true);
    Object.assign(this, { changed, said });
    this.playing = this.paused = false;
    this.takes = new Map(); // number -> {message, headers, fragments}
    this.openable = []; // numbers of the takes that the server keeps
    this.applied = null; // {prompt, seed, schedule} that the newest controls asked for
    this.asked = null; // when a take was asked for that has not begun, ms
    this.next = null; // what to play when the connection is there again
    this.since = null; // when the one that plays was asked for, until its first frame is on the screen
    this.rates = [];
    this.stream = new LiveStream({
      hello: (message) => {
        this.other = this.hello && FIXED.some((name) => message[name] !== this.hello[name]);
        if (this.other) return this.stream.socket.close(1000, "another model is played here now");
        this.begin(message);
        hello(this, message);
      },
      take: (message, control) => this.gotTake(message, control),
      video: (header, parts) => this.gotVideo(header, parts),
      applied: (message, control) => this.gotApplied(message, control),
      schedule,
      ended: ({ reason, message }) => {
        this.screen.end();
        this.setPlaying(false);
        this.say(message, reason !== "length" && reason !== "idle");
      },
      refused: ({ reason, retry_after }) => {
        this.setPlaying(false);
        this.say(`${reason} (try again in ${retry_after} s)`, true);
      },
      error: ({ message }, control) => {
        const what = CHANGES[control?.type];
        if (what) delete this.applied[what]; // what plays is not what was asked for: the next change sends it again
        else this.applied = {};
        this.say(message, true);
      },
      waiting: (reason) => this.say(reason),
      closed: (reason) => {
        this.setPlaying(false);
        this.next = null;
        const why = reason && ` (${reason})`, how = this.hello && !this.other ? "press Play to connect again" : "reload the page";
        this.say(reason && !this.hello ? reason : `The connection is closed${why}; ${how}.`, true);
      },
    });
  }

  say(text, wrong = false) {
    const name = this.$("title").textContent;
    this.said(name ? `${name}: ${text}` : text, wrong);
    if (name && wrong) this.$("warnings").textContent = text; // the other stream's words take its place above
  }

  $(name) { return this.root.querySelector(`.${name}`); }

  begin(hello) {
    this.hello = hello;
    this.openable = [];
    this.refreshTiles();
    if (this.screen) return;
    this.mp4 = canPlay(hello.mime);
    this.screen = this.mp4 ? new MP4Screen(hello) : new JPEGScreen(hello);
    this.screen.element.setAttribute("role", "img");
    this.screen.element.setAttribute("aria-label", "No video yet");
    this.screen.element.className = "screen";
    this.$("picture").prepend(this.screen.element);
  }

  // Where the connection is closed, when it is there again.
  play(control) {
    if (!this.stream.ready) {
      this.next = control;
      return this.stream.connect();
    }
    this.next = null;
    this.asked = performance.now();
    this.applied = { prompt: control.prompt, seed: control.seed, schedule: JSON.stringify(control.schedule) };
    this.$("latency").value = "–";
    this.$("warnings").textContent = "";
    this.stream.send("open", { ...control, video: this.mp4 ? "fmp4" : "jpeg" });
  }

  // Sends what differs from what the stream was asked for. Returns whether anything does.
  change({ prompt, seed, schedule, switch: how }) {
    const before = this.applied, key = JSON.stringify(schedule);
    if (prompt !== before.prompt) this.stream.send("set_prompt", { prompt, switch: how });
    if (seed !== before.seed) this.stream.send("set_seed", { seed });
    if (key !== before.schedule) this.stream.send("set_schedule", { schedule });
    this.applied = { prompt, seed, schedule: key };
    return prompt !== before.prompt || seed !== before.seed || key !== before.schedule;
  }

  // Go back to a chunk; with anything else in the form than it was made under, that is a branch.
  goBack(header, { prompt, seed, schedule }) {
    this.asked = performance.now();
    this.pause(false);
    const key = JSON.stringify(schedule), at = { chunk: header.chunk, take: header.take };
    const other = {
      ...(prompt !== header.prompt && { prompt }),
      ...(seed !== header.seed && { seed }),
      ...(key !== header.schedule && { schedule }),
    };
    const branch = Object.keys(other).length > 0;
    this.applied = { prompt, seed, schedule: key };
    this.say(`${branch ? "Branching off at" : "Going back to"} chunk ${header.chunk} of take ${header.take} …`);
    this.stream.send(branch ? "branch" : "seek", { ...at, ...other });
  }

  pause(on) {
    if (on === this.paused) return;
    this.paused = on;
    this.screen.pause(on);
    this.stream.send(on ? "pause" : "resume");
    this.changed(this);
  }

  setPlaying(on) {
    this.playing = on;
    this.changed(this);
  }

  gotTake(message, control) {
    this.paused = false;
    this.screen.pause(false);
    this.screen.begin(message.frame);
    [this.since, this.asked] = [this.asked, null];
    const parent = this.takes.get(message.parent);
    const there = parent?.headers.find(({ chunk }) => chunk === message.chunk);
    this.takes.set(message.take, {
      message,
      init: parent?.init, // that of its own is the same
      schedule: control.schedule ? JSON.stringify(control.schedule) : there.schedule, // of the next chunk
      headers: parent ? parent.headers.filter(({ chunk }) => chunk < message.chunk) : [],
      fragments: parent ? parent.fragments.filter(({ chunk }) => chunk < message.chunk) : [],
    });
    this.openable = message.takes;
    if (this.takes.size > MOST_TAKES) this.dropTake(this.takes.keys().next().value);
    this.addRow(message);
    this.$("warnings").textContent = message.warnings.join(" ");
    this.$("nfe").value = message.nfe;
    this.rates = [];
    this.setPlaying(true);
  }

  gotVideo(header, parts) {
    const take = this.takes.get(header.take);
    this.screen.append(header, parts);
    if (header.kind === "init") { take.init = parts[0]; return; }
    header.schedule = take.schedule;
    take.headers.push(header);
    if (header.kind === "fragment") take.fragments.push({ chunk: header.chunk, data: parts[0] });
    this.rates.push([performance.now(), header.frames]);
    this.rates = this.rates.slice(-8);
    this.addTile(header, parts.at(-1));
  }

  gotApplied({ take, chunk, frame, warnings }, control) {
    const what = CHANGES[control?.type];
    if (!what) return; // of a take, which has said its own
    if (what === "prompt") this.$("warnings").textContent = warnings.join(" ");
    if (what === "schedule") {
      const { headers } = this.takes.get(take);
      this.takes.get(take).schedule = headers.at(-1).schedule = JSON.stringify(control.schedule);
    }
    this.say(`The new ${what} shows from ${seconds(frame / this.hello.fps)} on (chunk ${chunk}).`);
  }

  // Once an animation frame.
  tick(now) {
    this.screen.tick(now);
    const shown = this.screen.shown, take = this.takes.get(this.stream.take);
    const header = take?.headers.findLast(({ frame }) => frame < shown);
    if (header?.take === this.stream.take && shown > take.message.frame && this.since !== null) { // not of its parent
      this.$("latency").value = Math.round(now - this.since);
      this.since = null;
      this.say(`Playing: ${header.prompt}`);
    }
    if (header && this.screen.element.dataset.prompt !== header.prompt) {
      this.screen.element.dataset.prompt = header.prompt;
      this.screen.element.setAttribute("aria-label", `Video of: ${header.prompt}`);
    }
  }

  // Several times a second: what the server may make, and the figures.
  report(now) {
    const shown = this.screen.shown;
    if (this.playing && shown !== this.reported) this.stream.shown((this.reported = shown));
    this.$("buffer").value = this.screen.ahead.toFixed(1);
    this.$("stalls").value = this.screen.stalls;
    this.history = [...(this.history ?? []), [now, shown]].filter(([time]) => now - time < 2000);
    const [[since, frames]] = this.history;
    this.$("shown-fps").value = now > since ? Math.max(0, (1000 * (shown - frames)) / (now - since)).toFixed(1) : "–";
    if (this.rates.length > 1) {
      const made = this.rates.slice(1).reduce((sum, [, n]) => sum + n, 0);
      this.$("made-fps").value = ((1000 * made) / (this.rates.at(-1)[0] - this.rates[0][0])).toFixed(1);
    }
  }

  // A row of tiles for each take: its own chunks, after those of the take that it went on from.
  addRow({ take, parent, chunk, frame, prompt, seed }) {
    const row = document.createElement("section"), title = document.createElement("p");
    row.dataset.take = take;
    title.className = "hint";
    const from = parent === null ? "" : `, from ${seconds(frame / this.hello.fps)} of take ${parent} on`;
    title.append(`Take ${take}${from}: “${prompt}”, seed ${seed} `);
    const links = this.mp4 ? [["MP4", () => this.video(take)], ["JSON", () => this.record(take)]] : [["JSON", () => this.record(take)]];
    for (const [kind, content] of links) {
      const link = document.createElement("button");
      link.type = "button";
      link.className = `link ${kind.toLowerCase()}`;
      link.textContent = kind;
      link.setAttribute("aria-label", `Download ${kind} of take ${take}`);
      link.onclick = () => {
        if (!this.takes.get(take).headers.length) return this.say(`Take ${take} has no chunk.`);
        save(content(), `${name(prompt)}-seed${seed}-take${take}.${kind.toLowerCase()}`);
      };
      title.append(link, " ");
    }
    row.append(title, document.createElement("ol"));
    this.$("strip").append(row);
    this.refreshTiles();
  }

  dropTake(take) {
    this.takes.delete(take);
    const row = this.$("strip").querySelector(`[data-take="${take}"]`);
    row.querySelectorAll("li").forEach(drop);
    row.remove();
  }

  addTile(header, thumbnail) {
    const list = this.$("strip").lastChild.querySelector("ol");
    const item = document.createElement("li"), button = document.createElement("button"), image = new Image();
    image.src = URL.createObjectURL(new Blob([thumbnail], { type: "image/jpeg" }));
    image.alt = "";
    button.type = "button";
    button.dataset.seekable = header.seekable || header.chunk === 0;
    button.title = `${header.prompt}, seed ${header.seed}, ${header.steps} steps`;
    button.setAttribute("aria-label", `Go back to chunk ${header.chunk}: ${header.prompt}`);
    button.append(image, `${seconds(header.frame / this.hello.fps)} · ${header.make_ms.toFixed(0)} ms`);
    button.onclick = () => this.onTile(header);
    item.append(button);
    list.append(item);
    const held = list.matches(":hover, :focus-within"), at = item.getBoundingClientRect().left;
    while (list.children.length > MOST_TILES) drop(list.firstChild);
    if (held) list.scrollLeft += item.getBoundingClientRect().left - at; // tiles stay where they are pointed at
    else list.scrollLeft = list.scrollWidth; // scrollIntoView would move the page, too
    this.refreshTile(button, header.take);
  }

  refreshTile(button, take) {
    button.disabled = button.dataset.seekable !== "true" || !this.openable.includes(take);
  }

  refreshTiles() {
    for (const row of this.$("strip").children)
      for (const button of row.querySelectorAll("li button")) this.refreshTile(button, Number(row.dataset.take));
  }

  video(take) {
    const { init, fragments } = this.takes.get(take);
    return new Blob([init, ...fragments.map(({ data }) => data)], { type: "video/mp4" });
  }

  record(take) {
    const { message, headers } = this.takes.get(take), schedule = headers[0]?.schedule ?? this.takes.get(take).schedule;
    const chunks = headers.map(({ chunk, frame, frames, prompt, seed, steps, nfe, make_ms, schedule: its }) => ({
      chunk, frame, frames, prompt, seed, steps, nfe, make_ms, ...(its !== schedule && { schedule: JSON.parse(its) }),
    }));
    const { model, device, fps, height, width, versions } = this.hello;
    const made = { model, device, fps, height, width, versions, take, parent: message.parent, schedule: JSON.parse(schedule), chunks };
    return new Blob([JSON.stringify(made, null, 2)], { type: "application/json" });
  }

  remove() {
    this.stream.close();
    this.screen?.drop();
    this.root.remove();
  }
}

const name = (prompt) => prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "video";

function drop(item) {
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
}

function save(blob, file) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: file });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
