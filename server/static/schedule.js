// The controls of one schedule: a preset or steps of one's own for each chunk, and the context mode.
const CONTEXT_HINTS = {
  last_step: "Later chunks see what the last denoising step left in the cache (diagonal forcing); it costs nothing.",
  clean: "One more pass over each finished chunk, without noise, as in Self-Forcing.",
  renoise: "One more pass over each finished chunk, with a little noise added again.",
};
const OWN = "own";

export class ScheduleForm {
  constructor(template, hello, title, changed) {
    this.root = template.content.firstElementChild.cloneNode(true);
    this.hello = hello;
    this.changed = changed;
    this.title = title;
    this.$("preset").append(new Option("steps of each chunk, set below", OWN));
    for (const name of hello.presets) this.$("preset").append(new Option(name, name));
    for (const name of hello.contexts) this.$("context").append(new Option(name, name, false, name === hello.context));
    hello.steps.forEach((count) => this.addSlider(count));
    this.$("preset").onchange = this.$("context").onchange = () => this.update();
    this.$("more").onclick = () => { this.addSlider(this.steps.at(-1)); this.update(); };
    this.$("fewer").onclick = () => { this.removeSlider(); this.update(); };
  }

  $(name) { return this.root.querySelector(`.${name}`); }
  set title(text) { this.root.querySelector("legend").textContent = text; }
  get steps() { return [...this.$("sliders").querySelectorAll("input")].map((slider) => Number(slider.value)); }

  // As the protocol has it.
  get value() {
    const preset = this.$("preset").value, context = this.$("context").value;
    return preset === OWN ? { steps: this.steps, context } : { preset, context };
  }

  set value({ steps, preset, context }) {
    const { presets, contexts, limits } = this.hello;
    this.$("preset").value = presets.includes(preset) ? preset : OWN;
    if (contexts.includes(context)) this.$("context").value = context;
    if (steps?.length) {
      while (this.$("sliders").children.length > 1) this.removeSlider();
      this.$("sliders").replaceChildren();
      for (const n of steps.slice(0, limits.rows)) this.addSlider(Math.min(limits.steps, Math.max(1, n || 1)));
    }
    this.update();
  }

  update() {
    const own = this.$("preset").value === OWN;
    this.$("own").hidden = !own;
    this.$("preset-hint").textContent = own ? "The last number holds for all later chunks." : "Timesteps as in the table below.";
    this.$("context-hint").textContent = CONTEXT_HINTS[this.$("context").value] ?? "";
    this.changed(this);
  }

  addSlider(value) {
    const rows = this.$("sliders"), k = rows.children.length;
    if (k >= this.hello.limits.rows) return;
    const row = document.createElement("label"), shown = document.createElement("output");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 1, max: this.hello.limits.steps, step: 1, value });
    row.className = "slider";
    shown.value = slider.value;
    slider.oninput = () => { shown.value = slider.value; this.update(); };
    row.append(`Chunk ${k}`, slider, shown);
    rows.append(row);
  }

  removeSlider() {
    if (this.$("sliders").children.length > 1) this.$("sliders").lastChild.remove();
  }

  show({ table, nfe, chunks, fps }) {
    this.$("table").textContent = table;
    const rate = fps === null ? "" : `; about ${fps.toFixed(0)} frames a second here`;
    this.$("cost").value = `${nfe} network evaluations for ${chunks} chunks${rate}`;
  }
}
