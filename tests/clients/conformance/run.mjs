// Holds a client library to what docs/protocol.md and docs/guarantees.md ask of one. See README.md.
//
//     node run.mjs NATTER [--only TEXT] [--seed N] [--log FILE] [--times] [--list] -- COMMAND...
//
// NATTER is the binary; COMMAND starts the driver of the client, once for each client. The script starts `natter up` with two edges
// and data of its own on free ports, and takes it down again. Its last line is `N passed, N failed`; it exits with 0 or 1.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import { randomInt } from "node:crypto";
import fs from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { Results, Up } from "../support.mjs";
import { Log, Skipped, Test, hello } from "./runner.mjs";
import { SCENARIOS } from "./scenarios.mjs";

/** Scenarios that run at the same time, besides one that kills an edge. */
const AT_ONCE = 4;

export const CONFIG = `
[auth]
leeway = "0s"

[edge]
drain_spread = "1s"

[limits]
commands_per_second = 100000
commands_burst = 100000

[rooms]
replay_max = 20000
replay_max_bytes = "64MiB"

[namespaces.chat]
durable = true
typing = true
history = true
presence = "users"
`;

/** Numbers from 0 to 1 that follow from a seed (mulberry32). */
export function randomOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** Runs one scenario; throws what was wrong. If it gives something, that is to be called after all scenarios. */
export async function runScenario({ name, needs, deed }, { up, command, can, sink, seed }) {
  const log = new Log(name, sink);
  const test = new Test({ up, command, can, log, random: randomOf(seed) });
  test.later = [];
  let error;
  try {
    test.needs(...needs);
    try {
      await deed(test);
    } catch (failure) {
      if (failure instanceof Skipped) throw failure;
      error = failure;
    }
    await test.judge(error);
  } catch (failure) {
    await test.close().catch(() => {}); // the first failure is the one to be told
    throw failure;
  }
  if (test.later.length === 0) {
    await test.close();
    return null;
  }
  return async () => {
    try {
      for (const look of test.later) look();
    } finally {
      await test.close();
    }
  };
}

async function main() {
  const args = process.argv.slice(2);
  const end = args.includes("--") ? args.indexOf("--") : args.length;
  const command = args.slice(end + 1);
  const options = { only: { type: "string", multiple: true }, seed: { type: "string" }, log: { type: "string" }, list: { type: "boolean" }, times: { type: "boolean" } };
  const { values, positionals } = parseArgs({ args: args.slice(0, end), options, allowPositionals: true });
  if (values.list) {
    for (const { name, needs } of SCENARIOS) console.log(needs.length ? `${name} (needs ${needs.join(", ")})` : name);
    return 0;
  }
  if (positionals.length !== 1 || command.length === 0) {
    console.error("usage: node run.mjs NATTER [--only TEXT] [--seed N] [--log FILE] [--times] [--list] -- COMMAND...");
    return 64;
  }
  const seed = values.seed === undefined ? randomInt(2 ** 31) : Number(values.seed);
  if (!Number.isSafeInteger(seed)) throw new Error(`--seed ${values.seed}: not a whole number`);
  const wanted = SCENARIOS.filter(({ name }) => !values.only || values.only.some((text) => name.includes(text)));
  if (wanted.length === 0) throw new Error(`--only ${values.only}: no such scenario; --list shows them`);

  const { name, can } = await hello(command);
  console.log(`${name}; can: ${can.join(", ") || "nothing more than is needed"}; seed ${seed}`);
  const results = new Results();
  const skipped = [];
  const times = [];
  const later = [];
  const sink = values.log === undefined ? undefined : fs.createWriteStream(values.log);
  const up = await Up.start(positionals[0], { config: CONFIG, edges: 2 });
  const run = async (scenario) => {
    const missing = scenario.needs.filter((need) => !can.includes(need));
    if (missing.length) {
      skipped.push(scenario.name);
      console.log(`skip  ${scenario.name}: the driver does not declare ${missing.join(", ")}`);
      return;
    }
    const began = performance.now();
    await results.run(scenario.name, async () => {
      const look = await runScenario(scenario, { up, command, can, sink, seed });
      if (look) later.push([scenario.name, look]);
    });
    times.push(`${((performance.now() - began) / 1000).toFixed(1)} s ${scenario.name}`);
  };
  try {
    const lane = async (waiting) => {
      for (let scenario = waiting.shift(); scenario; scenario = waiting.shift()) await run(scenario);
    };
    const rest = wanted.filter(({ kills }) => !kills).sort((a, b) => Number(b.isLong) - Number(a.isLong));
    const lanes = Array.from({ length: AT_ONCE }, () => lane(rest));
    // They kill the same edge, so one after the other.
    await Promise.all([...lanes, lane(wanted.filter(({ kills }) => kills))]);
    for (const [scenario, look] of later) await results.run(`afterwards: ${scenario}`, look);
  } finally {
    await up.stop();
    sink?.end();
  }
  if (values.times) console.log(times.join("\n"));
  if (skipped.length) console.log(`${skipped.length} skipped`);
  if (results.failed) console.log(`repeat with --seed ${seed}`);
  return results.sum();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) process.exit(await main());
