// The page: reads what is typed, asks the worker for drawings, and plays them against the clock.
"use strict";

(() => {
  const facts = tinyfusionFacts;
  const SLOW_MS = 4000; // length of the slow motion
  const MOST_IMAGES = 20;
  const PER_ROW = 5;
  const element = (id) => document.getElementById(id);
  const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const ms = (value) => number(value, value < 10 ? 2 : value < 100 ? 1 : 0);
  const single = facts.classes.every((name) => [...name].length === 1);

  const state = {
    labels: [],
    seed: facts.seed,
    guidance: facts.guidance.chosen,
    sides: facts.models.map((model) => ({
      sampler: 0, steps: model.samplers[0].chosen, gates: Array(model.depth).fill(1), film: [],
    })),
    id: 0,
    complete: false,
    slowNext: !matchMedia("(prefers-reduced-motion: reduce)").matches, // whether the next complete drawing is played in slow motion
    playing: null, // {begun, speed} of the slow motion
  };
  let worker = null;

  // ------------------------------------------------------------------------------------------------------------ elements

  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in made && typeof value !== "string") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const nameOf = (model) => model.role || model.name;
  const blocksOf = (model) => `${model.depth} block${model.depth === 1 ? "" : "s"}`;

  function buildTexts() {
    const [first, second] = facts.models;
    const kinds = single && facts.classes.every((name) => /\d/.test(name)) ? "digits" : single ? "letters" : "classes";
    element("title").textContent = second
      ? `${blocksOf(first)} and ${second.depth} draw from the same noise` : `${nameOf(first)}: ${blocksOf(first)} draw from noise`;
    document.title = `${facts.models.map(nameOf).join(" and ")} · tinyfusion`;
    element("lead").textContent = `${second ? "Both models run" : "The model runs"} in your browser; nothing is sent anywhere. `
      + `Type ${kinds}, move the sliders, or turn blocks off and watch.`;
    element("classes-label").textContent = single
      ? `Type ${kinds}` : "Type classes by number or name, separated by commas";
    element("typing").classList.toggle("words", !single);
    if (kinds === "digits") element("classes").inputMode = "numeric";
    element("classes").value = single ? [3, 1, 4, 1, 5].map((i) => facts.classes[i % facts.classes.length]).join("")
      : facts.classes.slice(0, 4).join(", ");
    const licence = `${facts.runtime} (MIT), WebAssembly on one thread`;
    element("footer").textContent = `Drawn by ${licence}. `
      + facts.models.map((model) => `${model.role ? `${model.role}: ` : ""}${model.name}, hash ${model.hash.slice(0, 12)}`).join("; ") + ".";
  }

  function buildChoice() {
    const box = element("choose");
    if (facts.classes.length <= 20) {
      box.append(...facts.classes.map((name, i) => {
        const button = make("button", { type: "button", "aria-label": `Add ${name}` }, name);
        button.onclick = () => addClass(i);
        return button;
      }));
      return;
    }
    const select = make("select", { "aria-label": "Add a class" }, make("option", { value: "" }, "Add a class"));
    select.append(...facts.classes.map((name, i) => make("option", { value: String(i) }, name === String(i) ? name : `${i} ${name}`)));
    select.onchange = () => {
      if (select.value !== "") addClass(Number(select.value));
      select.value = "";
    };
    box.append(select);
  }

  function buildModel(model, i) {
    const side = state.sides[i];
    const parameters = model.parameters >= 1e6 ? `${number(model.parameters / 1e6, 1)} million` : number(model.parameters, 0);
    const about = `${model.role ? `${model.name} · ` : ""}${blocksOf(model)} · ${parameters} parameters`;
    side.tiles = make("div", { class: "tiles", role: "img" });
    side.bar = make("span");
    side.large = make("span");
    side.detail = make("span", { class: "small" });
    side.faster = make("span", { class: "faster", hidden: true });
    const heading = make("h2", {}, make("b", {}, nameOf(model)), make("span", { class: "small" }, about));
    const card = make("article", { class: `card model own-${i}`, "aria-label": nameOf(model) }, heading, side.tiles,
      make("div", { class: "track", "aria-hidden": "true" }, side.bar),
      make("p", { class: "numbers" },
        make("span", { class: "large" }, side.large, make("small", {}, " ms per image")), side.faster, side.detail),
      stepsField(model, i));
    if (model.samplers.length > 1) card.append(samplerField(model, i));
    element("models").append(card);
  }

  function stepsField(model, i) {
    const side = state.sides[i];
    side.slider = make("input", { id: `steps-${i}`, type: "range", min: "0", step: "1", "aria-label": `Steps of ${nameOf(model)}` });
    side.stepsValue = make("output", { for: `steps-${i}` });
    side.slider.oninput = () => {
      side.steps = offered(model, side)[Number(side.slider.value)];
      showSteps(model, side);
      draw();
    };
    showSteps(model, side);
    if (Number(side.slider.max) === 0) { // distilled for these steps
      return make("div", { class: "field" }, make("span", {}, "Steps"), make("span", { class: "small" }, "as distilled"), side.stepsValue);
    }
    return make("div", { class: "field" }, make("label", { for: `steps-${i}` }, "Steps"), side.slider, side.stepsValue);
  }

  function samplerField(model, i) {
    const select = make("select", { id: `sampler-${i}` });
    select.append(...model.samplers.map((sampler, at) => make("option", { value: String(at) }, sampler.title)));
    select.onchange = () => {
      const side = state.sides[i];
      side.sampler = Number(select.value);
      if (!offered(model, side).includes(side.steps)) side.steps = model.samplers[side.sampler].chosen;
      showSteps(model, side);
      draw();
    };
    return make("div", { class: "field" }, make("label", { for: `sampler-${i}` }, "Sampler"), select);
  }

  const offered = (model, side) => Object.keys(model.samplers[side.sampler].steps).map(Number).sort((a, b) => a - b);

  function showSteps(model, side) {
    const numbers = offered(model, side);
    side.slider.max = String(numbers.length - 1);
    side.slider.value = String(numbers.indexOf(side.steps));
    side.slider.setAttribute("aria-valuetext", `${side.steps} steps`);
    side.stepsValue.textContent = String(side.steps);
  }

  // -------------------------------------------------------------------------------------------------------------- blocks

  function buildBlocks() {
    const pair = facts.models.length === 2 && facts.models.find((model) => model.role === "Student");
    element("blocks-about").textContent = "A block that is off adds nothing to the image on its way through the network. It is still "
      + "computed and multiplied by 0, so the time does not change.";
    facts.models.forEach((model, i) => {
      const side = state.sides[i];
      const row = make("div", { class: `row own-${i}`, role: "group", "aria-label": `Blocks of ${nameOf(model)}` },
        make("b", {}, nameOf(model)));
      row.style.setProperty("--columns", facts.columns);
      side.switches = model.columns.map((column, block) => {
        const button = make("button", {
          type: "button", class: "block", role: "switch", "aria-checked": "true", "aria-label": `Block ${column} of ${nameOf(model)}`,
        }, String(column));
        button.onclick = () => {
          side.gates[block] = 1 - side.gates[block];
          switched();
        };
        return button;
      });
      const narrow = matchMedia("(max-width: 760px)");
      const place = () => {
        const first = narrow.matches ? 1 : 2;
        for (const cell of row.querySelectorAll(".block, .gap")) cell.style.gridColumn = String(first + Number(cell.dataset.column));
      };
      for (let column = 0; column < facts.columns; column++) {
        const block = model.columns.indexOf(column);
        const cell = block < 0 ? make("span", { class: "gap", "aria-hidden": "true" }) : side.switches[block];
        cell.dataset.column = column;
        row.append(cell);
      }
      place();
      narrow.addEventListener("change", place);
      element("blocks").append(row);
    });
    const on = make("button", { type: "button", id: "all-on", disabled: true }, "All on");
    on.onclick = () => {
      state.sides.forEach((side) => side.gates.fill(1));
      switched();
    };
    element("block-buttons").append(on);
    if (pair) {
      const student = facts.models.indexOf(pair);
      const teacher = 1 - student;
      const same = make("button", { type: "button", id: "as-student" }, "Teacher with the student's blocks");
      same.onclick = () => {
        const { gates } = state.sides[teacher];
        facts.models[teacher].columns.forEach((column, i) => { gates[i] = pair.columns.includes(column) ? 1 : 0; });
        switched();
      };
      element("block-buttons").prepend(same);
    }
  }

  function switched() {
    for (const side of state.sides) {
      side.switches.forEach((button, i) => button.setAttribute("aria-checked", String(side.gates[i] === 1)));
    }
    element("all-on").disabled = state.sides.every((side) => side.gates.every((gate) => gate === 1));
    draw();
  }

  // -------------------------------------------------------------------------------------------------------------- classes

  // The classes of a text: [labels, words that are no class].
  function parse(text) {
    const find = (word) => {
      const wanted = word.toLowerCase();
      const exact = facts.classes.findIndex((name) => name.toLowerCase() === wanted);
      if (exact >= 0) return exact;
      if (/^\d+$/.test(word) && Number(word) < facts.classes.length) return Number(word);
      const begun = facts.classes.flatMap((name, i) => (name.toLowerCase().startsWith(wanted) ? [i] : []));
      return begun.length === 1 ? begun[0] : -1;
    };
    let words = single ? [...text].filter((character) => !/[\s,]/.test(character)) : text.split(/[,;]/);
    if (!single) words = words.flatMap((word) => (/^[\s\d]+$/.test(word) ? word.split(/\s+/) : [word]));
    words = words.map((word) => word.trim()).filter(Boolean);
    const labels = words.map(find);
    return [labels.filter((label) => label >= 0), words.filter((_, i) => labels[i] < 0)];
  }

  function addClass(label) {
    const labels = [...state.labels, label].slice(-MOST_IMAGES);
    element("classes").value = labels.map((each) => facts.classes[each]).join(single ? "" : ", ");
    typed();
  }

  function typed() {
    const [labels, unknown] = parse(element("classes").value);
    const classes = single ? `${facts.classes[0]} to ${facts.classes.at(-1)}` : `0 to ${facts.classes.length - 1}, or their names`;
    if (unknown.length) say(`There is no class ${unknown.map((word) => `“${word}”`).join(", ")}: type ${classes}.`, true);
    else if (labels.length > MOST_IMAGES) say(`The first ${MOST_IMAGES} are drawn.`);
    else if (!labels.length) say(`Type ${classes}.`);
    else say("");
    state.labels = labels.slice(0, MOST_IMAGES);
    draw();
  }

  function say(text, bad = false) {
    element("message").textContent = text;
    element("message").classList.toggle("bad", bad);
  }

  // -------------------------------------------------------------------------------------------------------------- drawing

  function draw() {
    buildTiles();
    showCommands();
    if (!worker || !state.labels.length) return;
    state.id += 1;
    state.complete = false;
    state.playing = null;
    state.sides.forEach((side) => { side.film = []; });
    const sides = state.sides.map((side, i) => ({
      model: i, gates: [...side.gates], steps: facts.models[i].samplers[side.sampler].steps[side.steps],
    }));
    worker.postMessage({ draw: { id: state.id, seed: state.seed, labels: state.labels, guidance: state.guidance, sides } });
  }

  function buildTiles() {
    state.sides.forEach((side, i) => {
      const names = state.labels.map((label) => facts.classes[label]).join(single ? " " : ", ");
      side.tiles.setAttribute("aria-label", names ? `Drawn by ${nameOf(facts.models[i])}: ${names}` : "Nothing drawn");
      const { side: size } = facts.image;
      while (side.tiles.childElementCount > state.labels.length) side.tiles.lastChild.remove();
      while (side.tiles.childElementCount < state.labels.length) side.tiles.append(make("canvas", { width: size, height: size }));
      const columns = Math.min(Math.max(state.labels.length, 1), PER_ROW);
      side.tiles.style.gridTemplateColumns = `repeat(${columns}, minmax(0, ${columns < 3 ? 160 : 220}px))`;
    });
  }

  // x in [-1, 1] to pixels, by the rule of `tinyfusion sample`.
  function paint(canvas, x, first) {
    const { channels, pixels, side } = facts.image;
    const picture = new ImageData(side, side);
    for (let pixel = 0; pixel < pixels; pixel++) {
      for (let colour = 0; colour < 3; colour++) {
        const value = x[first + (channels === 3 ? colour : 0) * pixels + pixel];
        picture.data[4 * pixel + colour] = Math.trunc(Math.min(Math.max(127.5 * value + 128, 0), 255));
      }
      picture.data[4 * pixel + 3] = 255;
    }
    canvas.getContext("2d", { willReadFrequently: true }).putImageData(picture, 0, 0); // in memory, not on a graphics card
  }

  // Show every model at `time` ms of its own computing; Infinity: as far as it is.
  function showAt(time) {
    const longest = Math.max(...state.sides.map(expected), 1e-3);
    for (const side of state.sides) {
      const frame = side.film.findLast((each) => each.ms <= time) ?? side.film[0];
      if (!frame) continue;
      const size = facts.image.channels * facts.image.pixels;
      [...side.tiles.children].forEach((canvas, i) => paint(canvas, frame.x, i * size));
      side.bar.style.width = `${(100 * frame.ms) / longest}%`;
      side.large.textContent = ms(frame.ms / state.labels.length);
      const each = frame.step ? `${ms(frame.ms / frame.step)} ms per step, ` : "";
      const left = frame.step < side.steps;
      side.detail.textContent = each + (left ? `step ${frame.step} of ${side.steps}` : `${side.steps} step${side.steps === 1 ? "" : "s"}`);
    }
  }

  // ms that a model will have taken, by its steps so far
  function expected(side) {
    const frame = side.film.at(-1);
    return frame?.step ? (frame.ms / frame.step) * side.steps : 0;
  }

  const total = () => Math.max(...state.sides.map((side) => side.film.at(-1)?.ms ?? 0), 1e-3);

  function showClock(time) {
    const whole = total();
    element("clock").value = String(Math.round((1000 * Math.min(time, whole)) / whole));
    const text = `${ms(Math.min(time, whole))} of ${ms(whole)} ms`;
    element("clock").setAttribute("aria-valuetext", text);
    element("clock-value").textContent = `${ms(Math.min(time, whole))} ms`;
  }

  function showFaster() {
    const times = state.sides.map((side) => side.film.at(-1).ms);
    const slowest = Math.max(...times);
    state.sides.forEach((side, i) => {
      const ratio = slowest / times[i];
      side.faster.hidden = times.length < 2 || ratio < 1.05;
      side.faster.textContent = `${number(ratio, ratio < 10 ? 1 : 0)} × as fast`;
    });
  }

  function finished() {
    state.complete = true;
    showFaster();
    if (state.slowNext) {
      state.slowNext = false;
      slowMotion();
    } else {
      showAt(Infinity);
      showClock(Infinity);
    }
  }

  function slowMotion() {
    if (!state.complete) return;
    state.playing = { begun: performance.now(), speed: Math.min(total() / SLOW_MS, 1) };
    requestAnimationFrame(play);
  }

  function play(now) {
    if (!state.playing) return;
    const time = Math.max(now - state.playing.begun, 0) * state.playing.speed;
    showAt(time);
    showClock(time);
    if (time < total()) requestAnimationFrame(play);
    else state.playing = null;
  }

  function showCommands() {
    const lines = facts.models.map((model, i) => {
      const side = state.sides[i];
      const sampler = model.samplers[side.sampler];
      const options = sampler.command.replace("{num_steps}", String(side.steps + sampler.more));
      const images = `--labels ${state.labels.join(",")} --num-images ${state.labels.length} --seed ${state.seed}`;
      const guidance = model.nullLabel === null ? "" : `--guidance ${state.guidance}`;
      const words = ["tinyfusion sample --model", model.source, options, guidance, images, `--out ${model.name}.npz`];
      const command = words.filter(Boolean).join(" ");
      return make("pre", {}, command + (side.gates.includes(0) ? "  # with all blocks on" : ""));
    });
    element("commands").replaceChildren(...(state.labels.length ? lines : []));
  }

  // -------------------------------------------------------------------------------------------------------------- loading

  const waiting = new Map();
  globalThis.tinyfusionAsset = (name, text) => waiting.get(name)(text);

  // The bytes of an asset: a script calls `tinyfusionAsset` with them as text. Scripts load from the disk too, unlike other files.
  async function asset(name) {
    const text = await new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = make("script", { src: `assets/${name}.js` });
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`assets/${name}.js cannot be read`));
      document.head.append(script);
    });
    waiting.delete(name);
    const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function load() {
    if (!globalThis.DecompressionStream || !globalThis.WebAssembly || ![].findLast) {
      throw new Error("This browser is too old to draw here: it lacks WebAssembly, DecompressionStream or findLast");
    }
    const bytes = Object.values(facts.assets).reduce((a, b) => a + b);
    say(`Loading ${number(bytes / 1e6, 1)} MB …`);
    const [code, glue, wasm, ...models] = await Promise.all(Object.keys(facts.assets).map(asset));
    worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
    const ready = new Promise((resolve, reject) => {
      worker.onerror = (event) => reject(new Error(event.message || "the worker did not start"));
      worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve());
    });
    worker.postMessage({ load: { glue, wasm, models, facts: { image: facts.image, noiseKey: facts.noiseKey, models: facts.models } } });
    await ready;
    worker.onmessage = ({ data }) => {
      if (data.error) say(`The drawing failed: ${data.error}`, true);
      else if (data.frame?.id === state.id) {
        state.sides[data.frame.side].film.push(data.frame);
        if (!state.slowNext) requestAnimationFrame(() => !state.complete && showAt(Infinity));
      } else if (data.done === state.id) finished();
    };
  }

  function listen() {
    element("typing").onsubmit = (event) => {
      event.preventDefault();
      slowMotion();
    };
    element("classes").oninput = typed;
    element("clear").onclick = () => {
      element("classes").value = "";
      element("classes").focus();
      typed();
    };
    element("slow").onclick = slowMotion;
    element("again").onclick = () => {
      state.seed = Math.floor(Math.random() * 2 ** 32);
      draw();
    };
    element("clock").oninput = () => {
      state.playing = null;
      const time = (Number(element("clock").value) * total()) / 1000;
      showAt(time);
      showClock(time);
    };
    const guidance = element("guidance");
    element("guidance-field").hidden = facts.guidance.most <= 1;
    guidance.max = String(facts.guidance.most);
    guidance.value = String(state.guidance);
    const shown = () => { element("guidance-value").textContent = number(state.guidance, 1); };
    guidance.oninput = () => {
      state.guidance = Number(guidance.value);
      shown();
      draw();
    };
    shown();
  }

  async function start() {
    buildTexts();
    buildChoice();
    facts.models.forEach(buildModel);
    buildBlocks();
    listen();
    try {
      await load();
      typed();
      document.documentElement.dataset.ready = "true";
    } catch (error) {
      worker = null;
      say(error.message, true);
      document.documentElement.dataset.ready = "false";
    }
  }

  globalThis.tinyfusionPage = state; // for tests and the curious
  start();
})();
