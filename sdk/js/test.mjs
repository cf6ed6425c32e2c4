// All tests of the SDK: `node sdk/js/test.mjs NATTER [NAME...]`. Without NATTER those that need a natter are skipped. Its last line
// is `N passed, N failed`; exit code 0 only if nothing failed.

import { spawnSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

const here = import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname);
const [binary, ...names] = process.argv.slice(2);
const work = fs.mkdtempSync(path.join(os.tmpdir(), "natter-sdk-"));
process.on("exit", () => fs.rmSync(work, { recursive: true, force: true }));

// The packages of the lock file, if others are there.
const lock = fs.readFileSync(path.join(here, "package-lock.json"));
const installed = path.join(here, "node_modules/.natter-lock");
if (!fs.existsSync(installed) || !fs.readFileSync(installed).equals(lock)) {
  const args = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"];
  const npm = spawnSync("npm", args, { cwd: here, stdio: "inherit", timeout: 300_000 });
  if (npm.status !== 0) {
    console.log(`npm ci ended with ${npm.status ?? npm.error}`);
    console.log("0 passed, 1 failed");
    process.exit(1);
  }
  fs.writeFileSync(installed, lock);
}

const tap = path.join(work, "tap");
const args = ["--test", "--test-reporter=spec", "--test-reporter-destination=stdout", "--test-reporter=tap", `--test-reporter-destination=${tap}`];
for (const name of names) args.push(`--test-name-pattern=${name}`);
const files = fs.readdirSync(path.join(here, "test")).filter((name) => name.endsWith(".test.mjs")).sort();
const env = { ...process.env, ...(binary && { NATTER: path.resolve(binary) }) };
const run = spawnSync(process.execPath, [...args, ...files.map((name) => path.join(here, "test", name))], { stdio: "inherit", env, timeout: 600_000 });
const text = fs.existsSync(tap) ? fs.readFileSync(tap, "utf8") : "";
const count = (name) => Number(text.match(new RegExp(`^# ${name} (\\d+)$`, "m"))?.[1] ?? 0);
if (count("skipped")) console.log(`${count("skipped")} skipped${binary ? "" : ": no NATTER"}`);
const failed = Math.max(count("fail") + count("cancelled"), run.status === 0 ? 0 : 1);
console.log(`${count("pass")} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
