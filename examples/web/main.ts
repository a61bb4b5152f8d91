// Tells what the camera or a picture shows. `?accelerator=webgpu` runs on the GPU; `?report=URL` posts what the page did
// to a test.
import {ImageClassifier} from './bundle/ImageClassifier.js';

const element = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const parameters = new URLSearchParams(location.search);

async function start() {
  const classifier = await ImageClassifier.load('bundle/model', {
    wasm: 'node_modules/@litertjs/core/wasm',
    accelerator: parameters.get('accelerator') === 'webgpu' ? 'webgpu' : 'wasm',
  });
  const selfTest = await classifier.selfTest();
  const {passed, agreement, maxError, tolerance} = selfTest;
  element('self-test').textContent =
    `Self-test ${passed ? 'passed' : 'FAILED'}: on ${selfTest.pictures} pictures the outputs differ by ${maxError.toPrecision(2)} ` +
    `at most (allowed: ${tolerance.toPrecision(2)}), and ${Math.round(100 * agreement)} % of the classes agree.`;

  const show = async (frame: ImageBitmapSource) => {
    const found = await classifier.classify(frame);
    element('labels').textContent = found.map((p) => `${(100 * p.probability).toFixed(1)} %  ${p.label}`).join('\n');
    return found;
  };
  element<HTMLInputElement>('picture').onchange = async (event) => {
    const [file] = (event.target as HTMLInputElement).files ?? [];
    if (file) await show(file);
  };
  element('camera').onclick = async () => {
    const video = element<HTMLVideoElement>('video');
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
    await video.play();
    for (;;) {
      await show(video);
      await new Promise(requestAnimationFrame);
    }
  };

  const pictures = parameters.getAll('picture'); // URLs
  const labels = [];
  for (const url of pictures) labels.push(await show(await (await fetch(url)).blob()));
  return {selfTest, labels};
}

const outcome = await start().catch((error: unknown) => {
  element('self-test').textContent = String(error);
  return {error: String(error)};
});
const report = parameters.get('report');
if (report) await fetch(report, {method: 'POST', body: JSON.stringify(outcome)});
