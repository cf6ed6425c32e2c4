// Centrifugo's SDK for JavaScript, unmodified, without a WebSocket: over its transports http_stream (JSON and Protobuf) and sse.
//
//     node fallbacks.mjs NATTER [NAME...]
//
// It does what sdk.mjs does over a WebSocket, where that is about no frames, and what only these transports have. NATTER,
// the names, what is installed and what is printed: see sdk.mjs.

import { CONFIG, FALLBACKS, Test } from "./clients.mjs";
import { SCENARIOS } from "./scenarios.mjs";
import { Results, Up } from "../support.mjs";

async function main() {
  const [binary, ...names] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node fallbacks.mjs NATTER [NAME...]");
    return 64;
  }
  const wanted = (scenario) => names.length === 0 || names.some((name) => scenario.name.includes(name));
  const results = new Results();
  const run = async (up, protocol, scenario, name = `${protocol.title}: ${scenario.name}`) => {
    const test = new Test(up, protocol);
    await results.run(name, () => scenario(test));
    test.close();
  };
  const up = await Up.start(binary, { config: CONFIG, edges: 2 });
  try {
    for (const protocol of FALLBACKS) {
      for (const scenario of SCENARIOS.filter(wanted)) await run(up, protocol, scenario);
    }
  } finally {
    await up.stop();
  }
  return results.sum();
}

process.exit(await main());
