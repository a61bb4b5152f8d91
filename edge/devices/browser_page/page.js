// Does what browser.py says: posts what it is, then an answer to each order, and gets the next order back. Every model
// lives in a frame of its own, so that one that breaks its LiteRT leaves the others alone.
const frames = [];
const show = (text) => (document.getElementById('status').textContent = text);
const note = (text) => document.getElementById('found').appendChild(document.createElement('li')).append(text);

async function post(path, content) {
  const response = await fetch(path, {method: 'POST', body: JSON.stringify(content)});
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

/** What is to be known of this browser. */
async function about() {
  const adapter = await navigator.gpu?.requestAdapter({powerPreference: 'high-performance'}).catch(() => null);
  const {vendor, architecture, description, isFallbackAdapter} = adapter?.info ?? {};
  const gpu = [vendor, architecture, description].filter(Boolean).join(' ') || 'unnamed';
  const hints = await navigator.userAgentData?.getHighEntropyValues(['fullVersionList', 'model']).catch(() => null);
  const brands = (hints?.fullVersionList ?? []).filter(({brand}) => !/not.*brand/i.test(brand));
  const {brand, version} = brands.find(({brand}) => brand !== 'Chromium') ?? brands[0] ?? {};
  return {
    agent: navigator.userAgent,
    browser: brand ? `${brand} ${version}` : '', // only Chromium tells, to a secure page
    device: hints?.model ?? '',
    platform: navigator.platform,
    cores: navigator.hardwareConcurrency,
    isolated: self.crossOriginIsolated,
    gpu: adapter ? gpu : '', // none
    software_gpu: Boolean(isFallbackAdapter),
  };
}

function frame() {
  return new Promise((resolve, reject) => {
    const element = document.createElement('iframe');
    element.src = 'model.html';
    element.onload = () =>
      element.contentWindow.litert ? resolve(element) : reject(new Error('LiteRT.js could not be loaded'));
    document.body.append(element);
  });
}

const tasks = {
  async load(order) {
    show(`Loading ${order.name} …`);
    frames[order.model] = await frame();
    return frames[order.model].contentWindow.litert.load(order);
  },
  check: (order) => frames[order.model].contentWindow.litert.check(order),
  run: (order) => {
    show('Measuring …');
    return frames[order.model].contentWindow.litert.run(order);
  },
  async drop(order) {
    frames[order.model]?.remove();
    return {};
  },
};

try {
  let {session, ...order} = await post('open', await about());
  addEventListener('pagehide', () => navigator.sendBeacon('left', JSON.stringify({session})));
  while (order.task) {
    const answer = await tasks[order.task](order).catch((error) => ({error: String(error?.message ?? error)}));
    order = await post('answer', {session, answer});
  }
  for (const line of order.found) note(line);
  show(order.end);
} catch (error) {
  show(String(error?.message ?? error));
}
