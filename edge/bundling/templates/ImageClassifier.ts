/**
 * Classifies camera frames in the browser. Runs on LiteRT.js: npm install @litertjs/core@2.5.3
 * Written by keras_vits; the folder `model` beside it is served as it is, and so is node_modules/@litertjs/core/wasm.
 *
 *   const classifier = await ImageClassifier.load('model', {wasm: 'node_modules/@litertjs/core/wasm'});
 *   const [best] = await classifier.classify(video);
 */
import {getGlobalLiteRtPromise, loadAndCompile, loadLiteRt, Tensor} from '@litertjs/core';
import type {CompiledModel} from '@litertjs/core';

export interface Prediction {
  label: string;
  probability: number;
  index: number; // of the class
}

export interface SelfTest {
  passed: boolean;
  pictures: number;
  agreement: number; // fraction of the pictures with the expected class
  maxError: number; // of an output
  tolerance: number;
}

export interface Options {
  wasm: string; // URL of the folder with LiteRT's WASM files
  accelerator?: 'wasm' | 'webgpu'; // CPU or GPU
}

interface Description {
  file: string;
  head: 'logits' | 'sigmoid' | 'softmax' | 'top_k'; // sigmoid: of a single class
  input: {name: string; shape: number[]; dtype: 'float32' | 'uint8'};
  outputs: {name: string}[];
  preprocessing: {
    mean: number[];
    std: number[];
    channel_order: 'rgb' | 'bgr';
    crop: number;
    crop_mode: 'center' | 'squash' | 'border';
  };
}

interface Expected {
  tolerance: {cpu: number; gpu: number};
  pictures: {file: string; class: number; output: number[]}[];
}

export class ImageClassifier {
  private constructor(
    private readonly folder: string,
    private readonly description: Description,
    private readonly labels: string[],
    private readonly model: CompiledModel,
    private readonly accelerator: 'wasm' | 'webgpu',
  ) {}

  static async load(folder: string, {wasm, accelerator = 'wasm'}: Options): Promise<ImageClassifier> {
    await (getGlobalLiteRtPromise() ?? loadLiteRt(wasm.endsWith('/') ? wasm : `${wasm}/`));
    const description: Description = await (await read(`${folder}/model.json`)).json();
    const labels = (await (await read(`${folder}/labels.txt`)).text()).split('\n').slice(0, -1);
    const file = new Uint8Array(await (await read(`${folder}/${description.file}`)).arrayBuffer());
    const model = await loadAndCompile(file, {accelerator});
    return new ImageClassifier(folder, description, labels, model, accelerator);
  }

  /**
   * The most probable labels of a video, canvas, image, ImageBitmap or ImageData, the best one first; of a model with a
   * single class that one, however improbable.
   */
  async classify(frame: ImageBitmapSource, top = 5): Promise<Prediction[]> {
    const bitmap = await createImageBitmap(frame);
    const [width, height] = this.resized(bitmap.width, bitmap.height);
    const outputs = await this.run(this.draw(bitmap, width, height));
    bitmap.close();
    const scores = this.probabilities(outputs[0]);
    const classes = this.description.head === 'top_k' ? outputs[1] : Array.from(scores.keys());
    return scores
      .map((probability, i) => ({label: this.label(classes[i]), probability, index: classes[i]}))
      .sort((a, b) => b.probability - a.probability)
      .slice(0, top);
  }

  /** Runs the ten pictures that came with the model and compares the outputs with the expected ones. */
  async selfTest(): Promise<SelfTest> {
    const expected: Expected = await (await read(`${this.folder}/selftest.json`)).json();
    const tolerance = expected.tolerance[this.accelerator === 'wasm' ? 'cpu' : 'gpu'];
    let maxError = 0;
    let agreeing = 0;
    for (const picture of expected.pictures) {
      const blob = await (await read(`${this.folder}/${picture.file}`)).blob();
      const bitmap = await createImageBitmap(blob, {colorSpaceConversion: 'none', premultiplyAlpha: 'none'});
      const outputs = await this.run(this.draw(bitmap, bitmap.width, bitmap.height));
      bitmap.close();
      const errors = picture.output.map((value, i) => Math.abs(outputs[0][i] - value));
      maxError = errors.reduce((a, b) => Math.max(a, b), maxError); // NaN stays
      agreeing += this.decide(outputs) === picture.class ? 1 : 0;
    }
    const pictures = expected.pictures.length;
    return {passed: maxError <= tolerance, pictures, agreement: agreeing / pictures, maxError, tolerance};
  }

  delete(): void {
    this.model.delete();
  }

  private label(index: number): string {
    return this.labels[index] ?? `class ${index}`;
  }

  /** Size of a frame in the pixels of the model's input, of which `crop` is kept. */
  private resized(width: number, height: number): [number, number] {
    const [, inputHeight, inputWidth] = this.description.input.shape;
    const {crop, crop_mode} = this.description.preprocessing;
    const targetHeight = Math.floor(inputHeight / crop);
    const targetWidth = Math.floor(inputWidth / crop);
    if (crop_mode === 'squash') return [targetWidth, targetHeight];
    if (crop_mode === 'center' && targetHeight === targetWidth) {
      const short = Math.min(width, height);
      return [Math.floor((targetWidth * width) / short), Math.floor((targetHeight * height) / short)];
    }
    const choose = crop_mode === 'center' ? Math.min : Math.max;
    const ratio = choose(height / targetHeight, width / targetWidth);
    return [round(width / ratio), round(height / ratio)];
  }

  /** RGBA of the model's input size, with the picture of this size in its middle, on the mean colour. */
  private draw(bitmap: ImageBitmap, width: number, height: number): Uint8ClampedArray {
    const [, inputHeight, inputWidth] = this.description.input.shape;
    const {mean, channel_order} = this.description.preprocessing;
    const context = new OffscreenCanvas(inputWidth, inputHeight).getContext('2d', {willReadFrequently: true})!;
    const color = (channel_order === 'bgr' ? [...mean].reverse() : mean).map((value) => Math.round(255 * value));
    context.fillStyle = `rgb(${color[0]} ${color[color.length >> 1]} ${color[color.length - 1]})`;
    context.fillRect(0, 0, inputWidth, inputHeight);
    context.imageSmoothingQuality = 'high';
    context.drawImage(bitmap, centered(width, inputWidth), centered(height, inputHeight), width, height);
    return context.getImageData(0, 0, inputWidth, inputHeight).data;
  }

  /** The outputs on RGBA pixels, in the order of model.json. */
  private async run(rgba: Uint8ClampedArray): Promise<number[][]> {
    const {input, outputs, preprocessing} = this.description;
    const {mean, std, channel_order} = preprocessing;
    const channels = input.shape[3];
    const raw = input.dtype === 'uint8';
    const data = new (raw ? Uint8Array : Float32Array)((rgba.length / 4) * channels);
    for (let pixel = 0, i = 0; pixel < rgba.length; pixel += 4) {
      for (let c = 0; c < channels; c++, i++) {
        if (raw) {
          data[i] = channels === 1 ? grey(rgba, pixel) : rgba[pixel + c];
        } else {
          const value = channels === 1 ? grey(rgba, pixel) : rgba[pixel + (channel_order === 'bgr' ? 2 - c : c)];
          data[i] = (value / 255 - mean[c]) / std[c];
        }
      }
    }
    const tensor = new Tensor(data, input.shape);
    const found = await this.model.run({[input.name]: tensor});
    const values = await Promise.all(outputs.map(async ({name}) => Array.from(await found[name].data())));
    [tensor, ...Object.values(found)].forEach((one) => one.delete());
    return values;
  }

  /** The class that outputs tell: the largest, or 1 and 0 for a single class that is there or not. */
  private decide([output, classes]: number[][]): number {
    if (this.description.head === 'top_k') return classes[0];
    if (output.length > 1) return output.indexOf(Math.max(...output));
    return output[0] > (this.description.head === 'sigmoid' ? 0 : 0.5) ? 1 : 0;
  }

  private probabilities(output: number[]): number[] {
    if (this.description.head === 'sigmoid') return output.map((value) => 1 / (1 + Math.exp(-value)));
    if (this.description.head !== 'logits') return output;
    const largest = Math.max(...output);
    const powers = output.map((value) => Math.exp(value - largest));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((value) => value / sum);
  }
}

/** Where a side begins that is put into the middle of another one. */
function centered(size: number, target: number): number {
  return size > target ? -round((size - target) / 2) : Math.floor((target - size) / 2);
}

/** Half to even, as Python rounds. */
function round(value: number): number {
  const up = Math.round(value);
  return up - value === 0.5 && up % 2 !== 0 ? up - 1 : up;
}

/** Luminance, ITU-R 601, in the integers that Pillow uses. */
function grey(rgba: Uint8ClampedArray, at: number): number {
  return (19595 * rgba[at] + 38470 * rgba[at + 1] + 7471 * rgba[at + 2] + 32768) >> 16;
}

async function read(url: string): Promise<Response> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}
