import {loadAndCompile, loadLiteRt, supportsFeature, Tensor} from '@litertjs/core';

let model, accelerator, name, images, shape;

async function read(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

/** Outputs by name on one batch, as arrays. */
async function run(batch) {
  const tensor = new Tensor(batch, shape);
  const found = await model.run({[name]: tensor});
  const values = {};
  for (const output in found) values[output] = await found[output].data();
  for (const one of [tensor, ...Object.values(found)]) one.delete();
  return values;
}

window.litert = {
  async load(order) {
    // LiteRT starts as many threads as there are cores, in each frame: only so many are needed.
    Object.defineProperty(navigator, 'hardwareConcurrency', {value: order.threads});
    const gpu = order.accelerator === 'webgpu';
    if (!gpu) Object.defineProperty(navigator, 'gpu', {value: undefined}); // or LiteRT takes a part of it for nothing
    await loadLiteRt('core/wasm/', order.threads > 1 ? {threads: true} : {jspi: gpu && (await supportsFeature('jspi'))});
    const file = new Uint8Array(await read(order.file));
    const start = performance.now();
    model = await loadAndCompile(file, {accelerator: order.accelerator, cpuOptions: {numThreads: order.threads}});
    const load_ms = performance.now() - start;
    ({accelerator} = model.options);
    if (accelerator !== order.accelerator) throw new Error(`LiteRT.js runs it on ${accelerator} instead`);
    return {load_ms, whole: !gpu || model.isFullyAccelerated};
  },

  /** Largest difference of each output from the expected one, null for NaN. */
  async check({input, images: url, expected: outputs}) {
    ({name, shape} = input);
    const size = shape.reduce((a, b) => a * b);
    images = new (input.dtype === 'uint8' ? Uint8Array : Float32Array)(await read(url));
    const expected = {};
    for (const output of outputs) expected[output.name] = new Float32Array(await read(output.file));
    const errors = {};
    for (let batch = 0; batch * size < images.length; batch++) {
      const found = await run(images.subarray(batch * size, (batch + 1) * size));
      for (const output in expected) {
        if (!found[output]) continue; // another signature's
        const start = batch * found[output].length;
        const differences = found[output].map((value, i) => Math.abs(value - expected[output][start + i]));
        errors[output] = differences.reduce((a, b) => Math.max(a, b), errors[output] ?? 0); // NaN stays
      }
    }
    images = images.slice(0, size);
    return {errors};
  },

  /** Milliseconds of each run, at least `runs` and for at least `seconds`. */
  async run({runs, seconds}) {
    const ms = [];
    const begin = performance.now();
    for (let start = begin; ms.length < runs || start - begin < 1e3 * seconds; ) {
      await run(images);
      const end = performance.now(); // of this run and the beginning of the next: no rounding adds up
      ms.push(end - start);
      start = end;
    }
    return {ms};
  },
};
