// Noise and sampling, as `tinyfusion sample` has them. Runs in the worker of the page, and in node for tests.
"use strict";

(() => {
  const MASK = (1n << 64n) - 1n;
  const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
  const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

  // Philox 4x64 with 10 rounds (Salmon et al. 2011): four random 64-bit words of a counter of four words and a key of two.
  function philox(counter, key) {
    let [a, b, c, d] = counter;
    let [k, l] = key;
    for (let round = 0; round < 10; round++) {
      const first = MULTIPLIERS[0] * a;
      const second = MULTIPLIERS[1] * c;
      [a, b, c, d] = [(second >> 64n) ^ b ^ k, second & MASK, (first >> 64n) ^ d ^ l, first & MASK];
      k = (k + WEYL[0]) & MASK;
      l = (l + WEYL[1]) & MASK;
    }
    return [a, b, c, d];
  }

  function polynomial(coefficients, x) {
    return coefficients.reduceRight((sum, coefficient) => sum * x + coefficient, 0);
  }

  // Coefficients of algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988): numerator and denominator of three ranges.
  const CENTRAL = [
    [3.387132872796366608, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125, 45921.953931549871457,
      67265.770927008700853, 33430.575583588128105, 2509.0809287301226727],
    [1, 42.313330701600911252, 687.1870074920579083, 5394.1960214247511077, 21213.794301586595867, 39307.89580009271061,
      28729.085735721942674, 5226.495278852854561],
  ];
  const MIDDLE = [
    [1.42343711074968357734, 4.6303378461565452959, 5.7694972214606914055, 3.64784832476320460504, 1.27045825245236838258,
      0.24178072517745061177, 0.0227238449892691845833, 7.7454501427834140764e-4],
    [1, 2.05319162663775882187, 1.6763848301838038494, 0.68976733498510000455, 0.14810397642748007459,
      0.0151986665636164571966, 5.475938084995344946e-4, 1.05075007164441684324e-9],
  ];
  const FAR = [
    [6.6579046435011037772, 5.4637849111641143699, 1.7848265399172913358, 0.29656057182850489123, 0.026532189526576123093,
      0.0012426609473880784386, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
    [1, 0.59983220655588793769, 0.13692988092273580531, 0.0148753612908506148525, 7.868691311456132591e-4,
      1.8463183175100546818e-5, 1.4215117583164458887e-7, 2.04426310338993978564e-15],
  ];

  // The standard normal quantile of a probability in (0, 1).
  function quantile(probability) {
    const q = probability - 0.5;
    const ratio = ([above, below], r) => polynomial(above, r) / polynomial(below, r);
    if (Math.abs(q) <= 0.425) return q * ratio(CENTRAL, 0.180625 - q * q);
    const r = Math.sqrt(-Math.log(q < 0 ? probability : 1 - probability));
    const size = r <= 5 ? ratio(MIDDLE, r - 1.6) : ratio(FAR, r - 5);
    return q < 0 ? -size : size;
  }

  // (numImages * size) standard normal values of images 0, 1, ... `position` is the step whose noise it is, -1 the start.
  // purposeKey: the second word of the key, as text.
  function noise(seed, purposeKey, position, numImages, size) {
    const key = [BigInt(seed), BigInt(purposeKey)];
    const counters = Math.ceil(size / 4);
    const values = new Float32Array(numImages * size);
    for (let block = 0; block < numImages * counters; block++) {
      const words = philox([BigInt(block + 1), 0n, BigInt(position + 1), 0n], key);
      const image = Math.floor(block / counters);
      const first = 4 * (block % counters);
      for (let i = 0; i < 4 && first + i < size; i++) {
        values[image * size + first + i] = quantile(Number(words[i] >> 11n) * 2 ** -53 + 2 ** -54);
      }
    }
    return values;
  }

  // The network's prediction under classifier-free guidance, without channels of a variance.
  // network(x, t, labels) -> Promise of the output (rows, channels and maybe more, pixels).
  // model: {channels, outputChannels, guidedChannels, pixels, nullLabel}; guidance 1 runs the conditional model alone.
  async function predict(network, model, x, t, labels, guidance) {
    const { channels, outputChannels, guidedChannels, pixels } = model;
    const count = labels.length;
    const guided = guidance !== 1;
    const rows = guided ? [...labels, ...labels.map(() => model.nullLabel)] : labels;
    let input = x;
    if (guided) {
      input = new Float32Array(2 * x.length);
      input.set(x);
      input.set(x, x.length);
    }
    const output = await network(input, t, rows);
    const mixed = new Float32Array(x.length);
    for (let image = 0; image < count; image++) {
      for (let i = 0; i < channels * pixels; i++) {
        const conditional = output[image * outputChannels * pixels + i];
        const without = guided && i < guidedChannels * pixels ? output[(count + image) * outputChannels * pixels + i] : 0;
        mixed[image * channels * pixels + i] =
          guided && i < guidedChannels * pixels ? without + guidance * (conditional - without) : conditional;
      }
    }
    return mixed;
  }

  // One step of a sampler. `step` is a list of evaluations {t, start, x, out, noise}: each replaces x by
  // start * (x at the beginning of the step) + x * (x now) + out * (prediction at t) + noise * (fresh noise).
  async function makeStep(predicted, step, x, freshNoise) {
    const beginning = x;
    for (const evaluation of step) {
      const output = await predicted(x, evaluation.t);
      const fresh = evaluation.noise ? freshNoise() : null;
      const next = new Float32Array(x.length);
      for (let i = 0; i < x.length; i++) {
        next[i] = evaluation.start * beginning[i] + evaluation.x * x[i] + evaluation.out * output[i];
        if (fresh) next[i] += evaluation.noise * fresh[i];
      }
      x = next;
    }
    return x;
  }

  globalThis.tinyfusionSampling = { noise, predict, makeStep };
})();
