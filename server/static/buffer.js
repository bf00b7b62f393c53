// Frames arrive in bursts and leave at the video's rate. Playing starts once `target` seconds are there; each time the
// buffer runs dry it waits for more than before, up to MOST, and what was needed shrinks again while all goes well.
const LEAST = 0.3, MOST = 2.5;

export class JitterBuffer {
  constructor(fps) {
    this.fps = fps;
    this.target = LEAST;
    this.stalls = 0;
    this.clear();
  }

  clear() {
    for (const { image } of this.queue ?? []) image.close();
    this.queue = [];
    this.shown = 0; // frames of this take
    this.due = null; // when the next frame is, ms; null = filling
    this.generation = (this.generation ?? 0) + 1;
    this.waiting = Promise.resolve();
    this.times = [];
  }

  get seconds() { return this.queue.length / this.fps; }

  // images: promises of bitmaps, in order
  push(images, extra) {
    const generation = this.generation;
    this.waiting = this.waiting.then(async () => {
      for (const promise of images) {
        const image = await promise;
        if (generation === this.generation) this.queue.push({ image, ...extra });
        else image.close();
      }
    });
  }

  // The frame to show at time `now`, or null if the one on the screen stays.
  next(now) {
    if (this.due === null) {
      // the very first frame is shown as soon as it is there; the rest waits for the buffer
      if (this.queue.length && (this.shown === 0 || this.seconds >= this.target)) this.due = now;
      else return null;
    }
    if (now < this.due) return null;
    if (!this.queue.length) {
      this.due = null;
      this.stalls += 1;
      this.target = Math.min(MOST, this.target * 1.5);
      return null;
    }
    if (now - this.due > 500) this.due = now; // the page slept
    this.due += 1000 / this.fps;
    this.target = Math.max(LEAST, this.target * 0.9995);
    this.shown += 1;
    this.times.push(now);
    if (this.times.length > 2 * this.fps) this.times.shift();
    return this.queue.shift();
  }

  rate(now) {
    const recent = this.times.filter((time) => now - time < 2000);
    return recent.length > 1 ? (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0]) : 0;
  }
}
