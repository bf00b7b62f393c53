// One stream over the live protocol, version 1 (docs/live-protocol.md): controls out, messages and video in. Takes are
// numbered on from one connection to the next.
export const folder = location.pathname.replace(/[^/]*$/, ""); // a proxy may show the page below a path
const RETRY = 1013, RETRY_MS = 1000; // close code of a server that is not ready or full

export class LiveStream {
  // on: {hello, take, applied, ended, schedule, refused, error}, each called with a message; video(header, parts), where
  // parts are Uint8Arrays; waiting(reason): the server is not ready, another attempt follows; closed(reason)
  constructor(on) {
    this.on = on;
    this.number = 0;
    this.take = null; // the newest
    this.before = 0; // number of the last take of earlier connections
    this.waiting = new Map(); // id -> control that has no receipt yet
    this.connect();
  }

  // Again, where the connection is closed.
  connect() {
    if (this.socket?.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.retry);
    this.session = null;
    this.before = this.take ?? 0;
    this.waiting.clear();
    this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${folder}v1/live`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.heard(this.numbered(JSON.parse(data))) : this.got(data));
    this.socket.onclose = ({ code, reason }) => {
      this.reason = reason;
      if (code !== RETRY || this.session) return this.on.closed?.(reason);
      this.on.waiting?.(reason);
      this.retry = setTimeout(() => this.connect(), RETRY_MS);
    };
  }

  get open() { return this.socket.readyState === WebSocket.OPEN; }

  get ready() { return this.open && Boolean(this.session); }

  // Sends a control and returns its id; null where the connection is closed, which is told again. `fields` without a
  // value are left out.
  send(type, fields = {}) {
    if (!this.open) {
      this.on.closed?.(this.reason);
      return null;
    }
    const id = ++this.number;
    this.waiting.set(id, { type, ...fields });
    const own = fields.take && { take: fields.take - this.before };
    this.socket.send(JSON.stringify({ type, id, ...fields, ...own }));
    return id;
  }

  shown(frame) {
    if (this.open && this.take > this.before)
      this.socket.send(JSON.stringify({ type: "shown", take: this.take - this.before, frame }));
  }

  // Of a message or a header: the page's numbers of takes in place of the connection's.
  numbered({ ...from }) {
    for (const name of ["take", "parent"]) if (from[name]) from[name] += this.before;
    if (from.takes) from.takes = from.takes.map((take) => take + this.before);
    return from;
  }

  heard(message) {
    if (message.type === "hello") this.session = message.session;
    if (message.type === "take") this.take = message.take;
    const control = this.waiting.get(message.id);
    if (["applied", "schedule", "refused", "error"].includes(message.type)) this.waiting.delete(message.id);
    this.on[message.type]?.(message, control);
  }

  got(data) {
    const size = new DataView(data).getUint32(0, true);
    const header = this.numbered(JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size))));
    if (header.take !== this.take) return; // of a take that was left
    let at = 4 + size;
    const parts = header.sizes.map((n) => new Uint8Array(data, (at += n) - n, n));
    this.on.video(header, parts);
  }

  // Throws an Error with a sentence where the picture is not taken.
  async upload(file) {
    const answer = await fetch(`${folder}v1/live/${this.session}/image`, { method: "POST", body: file }).catch(() => null);
    if (answer?.ok) return;
    if (!answer) throw new Error("The server did not answer; try again.");
    const { error } = await answer.json().catch(() => ({}));
    throw new Error(error?.message || `The picture was not taken (${answer.status}).`);
  }

  close() {
    clearTimeout(this.retry);
    this.on = { video() {} };
    this.socket.close(1000);
  }
}
