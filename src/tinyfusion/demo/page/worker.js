// The worker of the page: runs the networks with onnxruntime-web, one step of one model at a time, and posts every state.
"use strict";

(() => {
  const { noise, predict, makeStep } = globalThis.tinyfusionSampling;
  const sessions = [];
  let current = 0; // number of the newest drawing; an older one stops
  let facts = null;

  // Let messages in between two steps; a timer would wait 4 ms.
  const channel = new MessageChannel();
  const pause = () => new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });

  async function load({ glue, wasm, models, facts: given }) {
    facts = given;
    ort.env.wasm.numThreads = 1; // several need headers that a plain server does not send
    ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([glue], { type: "text/javascript" })) };
    ort.env.wasm.wasmBinary = wasm;
    for (const bytes of models) {
      sessions.push(await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], graphOptimizationLevel: "all" }));
    }
    for (let i = 0; i < sessions.length; i++) { // the first call of a session is slower
      const side = newSide({ model: i, gates: Array(facts.models[i].depth).fill(1), steps: [] }, [0], 1, () => new Float32Array(facts.image.channels * facts.image.pixels));
      for (let call = 0; call < 3; call++) await side.network(side.x, 1, [0]);
    }
  }

  function newSide(side, labels, guidance, fresh) {
    const { channels, pixels } = facts.image;
    const model = { ...facts.models[side.model], channels, pixels };
    const network = async (x, t, rows) => {
      const shape = [rows.length, channels, facts.image.side, facts.image.side];
      const feeds = {
        x: new ort.Tensor("float32", x, shape),
        t: new ort.Tensor("float32", new Float32Array(rows.length).fill(t), [rows.length]),
        y: new ort.Tensor("int64", BigInt64Array.from(rows, BigInt), [rows.length]),
        gates: new ort.Tensor("float32", Float32Array.from(side.gates), [side.gates.length]),
      };
      return (await sessions[side.model].run(feeds)).output.data;
    };
    return { network, model, steps: side.steps, done: 0, ms: 0, x: fresh(-1), fresh,
      predicted: (x, t) => predict(network, model, x, t, labels, model.nullLabel === null ? 1 : guidance) };
  }

  // Draw with all models. The one that has computed least so far makes the next step, so that both seem to run side by side
  // while each is timed alone.
  async function draw({ id, seed, labels, guidance, sides }) {
    current = id;
    const size = facts.image.channels * facts.image.pixels;
    const start = noise(seed, facts.noiseKey, -1, labels.length, size);
    const fresh = (position) => (position < 0 ? start : noise(seed, facts.noiseKey, position, labels.length, size));
    const running = sides.map((side) => newSide(side, labels, guidance, fresh));
    running.forEach((side, i) => post(id, i, side));
    for (;;) {
      const left = running.filter((side) => side.done < side.steps.length);
      if (!left.length) break;
      const side = left.reduce((a, b) => (b.ms < a.ms ? b : a));
      const begun = performance.now();
      side.x = await makeStep(side.predicted, side.steps[side.done], side.x, () => side.fresh(side.done));
      side.ms += performance.now() - begun;
      side.done += 1;
      post(id, running.indexOf(side), side);
      await pause();
      if (current !== id) return;
    }
    postMessage({ done: id });
  }

  function post(id, side, { done, ms, x }) {
    postMessage({ frame: { id, side, step: done, ms, x } });
  }

  onmessage = async ({ data }) => {
    try {
      if (data.load) {
        await load(data.load);
        postMessage({ ready: true });
      } else {
        await draw(data.draw);
      }
    } catch (error) {
      postMessage({ error: String(error?.message ?? error) });
    }
  };
})();
