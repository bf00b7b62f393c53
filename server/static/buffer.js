// Frames arrive in bursts and leave at the video's rate. Playing starts once `target` seconds are there; each time the
// buffer runs dry it waits for more than before, up to MOST, and what was needed shrinks again while all goes well.
export const LEAST = 0.3, MOST = 2.5; // seconds

export class JitterBuffer {
  constructor(fps) {
    this.fps = fps;
    this.target = LEAST;
    this.stalls = 0;
    this.clear();
  }

  clear() {
    for (const image of this.queue ?? []) image.close();
    this.queue = [];
    this.over = false; // whether no more frames come
    this.shown = 0; // frames of this take
    this.due = null; // when the next frame is, ms; null = filling
    this.generation = (this.generation ?? 0) + 1;
    this.waiting = Promise.resolve();
  }

  get seconds() { return this.queue.length / this.fps; }

  // images: promises of bitmaps, in order
  push(images) {
    const generation = this.generation;
    this.waiting = this.waiting.then(async () => {
      for (const promise of images) {
        const image = await promise;
        if (generation === this.generation) this.queue.push(image);
        else image.close();
      }
    });
  }

  // The frame to show at time `now`, or null if the one on the screen stays.
  next(now) {
    if (this.due === null) {
      // the very first frame is shown as soon as it is there; the rest waits for the buffer
      const enough = this.shown === 0 || this.over || this.seconds >= this.target;
      if (this.queue.length && enough) this.due = now;
      else return null;
    }
    if (now < this.due) return null;
    if (!this.queue.length) {
      this.due = null;
      if (!this.over) {
        this.stalls += 1;
        this.target = Math.min(MOST, this.target * 1.5);
      }
      return null;
    }
    if (now - this.due > 500) this.due = now; // the page slept
    this.due += 1000 / this.fps;
    this.target = Math.max(LEAST, this.target * 0.9995);
    this.shown += 1;
    return this.queue.shift();
  }
}
