// Two ways to show a stream: MP4 fragments in a <video> through Media Source Extensions, JPEG frames on a <canvas>.
// Frames are counted from the beginning of the video, as the protocol counts them. Both have
//   begin(frame)           a take begins at this frame; what was buffered from there on is dropped
//   append(header, parts)  a chunk
//   tick(now)              once an animation frame: start, stall, evict
//   end()                  no more chunks come: play what is there
//   shown                  frames up to this one (exclusive) have been shown
//   ahead                  seconds that are buffered
//   stalls, paused, element
import { JitterBuffer, LEAST, MOST } from "./buffer.js";

const Source = window.ManagedMediaSource ?? window.MediaSource;
const KEEP = 20, EVICT = 60; // seconds of the past that stay in the <video>; when the rest is dropped

export const canPlay = (mime) => Boolean(Source?.isTypeSupported(mime));

export class MP4Screen {
  constructor(hello) {
    this.fps = hello.fps;
    this.element = Object.assign(document.createElement("video"), {
      muted: true, playsInline: true, disableRemotePlayback: true, width: hello.width, height: hello.height,
    });
    this.stalls = 0;
    this.target = LEAST;
    this.paused = false;
    this.origin = 0;
    this.jump = null; // seconds to go to as soon as they are there
    this.over = true;
    this.work = [];
    this.media = new Source();
    this.media.onsourceopen = () => {
      URL.revokeObjectURL(this.element.src);
      this.buffer = this.media.addSourceBuffer(hello.mime);
      this.buffer.onupdateend = () => this.next();
      this.next();
    };
    this.element.src = URL.createObjectURL(this.media);
  }

  // SourceBuffer does one thing at a time.
  next() {
    if (!this.buffer || this.buffer.updating || this.media.readyState !== "open") return;
    this.work.shift()?.();
    if (this.work.length && !this.buffer.updating) this.next();
  }

  later(step) {
    this.work.push(step);
    this.next();
  }

  begin(frame) {
    this.work = [];
    this.over = false;
    this.origin = frame;
    this.jump = frame / this.fps;
    this.element.pause();
    const from = this.jump;
    this.later(() => this.buffer.buffered.length && this.buffer.remove(from, Infinity));
  }

  append(header, parts) {
    this.later(() => this.buffer.appendBuffer(parts[0]));
  }

  end() { this.over = true; }

  get ahead() {
    const ranges = this.element.buffered, at = this.jump ?? this.element.currentTime;
    for (let i = 0; i < ranges.length; i++)
      if (ranges.start(i) <= at + 0.01 && at < ranges.end(i)) return ranges.end(i) - at;
    return 0;
  }

  get shown() {
    if (this.jump !== null) return this.origin;
    return Math.max(this.origin, Math.floor(this.element.currentTime * this.fps + 0.01) + 1);
  }

  pause(on) {
    this.paused = on;
    if (on) this.element.pause();
  }

  tick() {
    const video = this.element;
    if (this.jump !== null) {
      if (this.ahead === 0 || this.work.length) return;
      video.currentTime = this.jump + 0.001; // the frame's own time may be rounded down
      this.jump = null;
    }
    if (this.paused || video.seeking) return;
    const ahead = this.ahead, least = this.over ? 0.001 : 1.5 / this.fps;
    if (video.paused && ahead > least && (this.over || ahead >= this.target)) video.play().catch(() => {});
    else if (!video.paused && ahead <= least) {
      video.pause();
      if (!this.over) {
        this.stalls += 1;
        this.target = Math.min(MOST, this.target * 1.5);
      }
    }
    this.target = Math.max(LEAST, this.target * 0.9998);
    const first = video.buffered.length ? video.buffered.start(0) : 0;
    if (video.currentTime - first > EVICT && !this.work.length) {
      const until = video.currentTime - KEEP;
      this.later(() => this.buffer.remove(0, until));
    }
  }

  drop() {
    this.element.pause();
    this.element.removeAttribute("src");
    this.element.load();
  }
}

export class JPEGScreen {
  constructor(hello) {
    this.element = Object.assign(document.createElement("canvas"), { width: hello.width, height: hello.height });
    this.brush = this.element.getContext("2d");
    this.buffer = new JitterBuffer(hello.fps);
    this.paused = false;
    this.origin = 0;
  }

  begin(frame) {
    this.origin = frame;
    this.buffer.clear();
  }

  append(header, parts) {
    // decoding is started for all, and they enter the buffer in order; the last part is the thumbnail
    const blobs = parts.slice(0, -1).map((part) => new Blob([part], { type: "image/jpeg" }));
    this.buffer.push(blobs.map((blob) => createImageBitmap(blob)));
  }

  end() { this.buffer.over = true; }
  get ahead() { return this.buffer.seconds; }
  get shown() { return this.origin + this.buffer.shown; }
  get stalls() { return this.buffer.stalls; }
  pause(on) { this.paused = on; }

  tick(now) {
    const image = this.paused ? null : this.buffer.next(now);
    if (!image) return;
    this.brush.drawImage(image, 0, 0);
    image.close();
  }

  drop() { this.buffer.clear(); }
}
