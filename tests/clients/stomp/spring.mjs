// Spring's STOMP client, unmodified, against natter: runs spring/Stomp.java, and the Java example of docs/stomp.md.
//
//     node spring.mjs NATTER
//
// NATTER is the binary. Maven fetches the jars of spring/pom.xml into .natter/clients/stomp-spring, where they must have the
// hashes of spring/jars.sha256. Exits with 77 where there is no JDK or no Maven.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import fs from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

import { Results, Up, exampleOf, jwt, newName, nowSeconds, until, within } from "../support.mjs";

const FILES = path.join(path.dirname(fileURLToPath(import.meta.url)), "spring");
const JARS = path.resolve(FILES, "../../../../.natter/clients/stomp-spring");
const COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies";
const FETCH_DEADLINE = 300_000;
const RUN_DEADLINE = 120_000;

/** The jars that are wanted, with their hashes. */
function wanted() {
  const lines = fs.readFileSync(path.join(FILES, "jars.sha256"), "utf8").trim().split("\n");
  return new Map(lines.map((line) => line.split(/\s+/).reverse()));
}

/** The jars that are there, with their hashes. */
function present() {
  const hash = (name) => createHash("sha256").update(fs.readFileSync(path.join(JARS, name))).digest("hex");
  return new Map(fs.readdirSync(JARS).filter((name) => name.endsWith(".jar")).map((name) => [name, hash(name)]));
}

function same(one, other) {
  return one.size === other.size && [...one].every(([name, hash]) => other.get(name) === hash);
}

function fetchJars() {
  fs.mkdirSync(JARS, { recursive: true });
  if (same(present(), wanted())) return;
  for (const name of present().keys()) fs.rmSync(path.join(JARS, name));
  const args = ["-q", "-B", "-f", path.join(FILES, "pom.xml"), COPY, `-DoutputDirectory=${JARS}`];
  const maven = spawnSync("mvn", args, { stdio: "inherit", timeout: FETCH_DEADLINE });
  if (maven.status !== 0) throw new Error(`mvn ended with ${maven.status ?? maven.error}`);
  assert.deepEqual(present(), wanted(), "other jars than those of jars.sha256");
}

function java(file, args, options) {
  return spawn("java", ["-cp", path.join(JARS, "*"), file, ...args], options);
}

async function main() {
  const [binary] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node spring.mjs NATTER");
    return 64;
  }
  for (const program of ["java", "javac", "mvn"]) {
    if (spawnSync(program, ["-version"]).error) {
      console.log(`skipped: no ${program}; Spring's STOMP client needs a JDK (17 or newer) and Maven`);
      return 77;
    }
  }
  fetchJars();
  const results = new Results();
  const up = await Up.start(binary);
  let example;
  try {
    const now = nowSeconds();
    const grants = [{ rooms: "chat:*", can: ["read", "write", "history"] }];
    const [token, other] = ["kim", "lee"].map((sub) => jwt({ sub, iat: now, exp: now + 3600, grants }, up.secret()));
    const tests = java(path.join(FILES, "Stomp.java"), [up.address(0), token, other], { stdio: ["ignore", "pipe", "inherit"] });
    let sum = "";
    createInterface({ input: tests.stdout }).on("line", (line) => {
      if (/^\d+ passed, \d+ failed$/.test(line)) sum = line;
      else console.log(line);
    });
    const code = await within(new Promise((resolve) => tests.once("close", resolve)), "Stomp.java", RUN_DEADLINE);
    [results.passed, results.failed] = sum ? sum.match(/\d+/g).map(Number) : [0, 1];
    if (code !== 0 && results.failed === 0) results.failed = 1;

    const file = path.join(JARS, `${newName("Example")}.java`);
    fs.writeFileSync(file, exampleOf("stomp", "java").replaceAll("127.0.0.1:8080", up.address(0)));
    example = java(file, [], { env: { ...process.env, TOKEN: token }, stdio: ["ignore", "pipe", "inherit"] });
    let said = "";
    example.stdout.on("data", (data) => (said += data));
    await results.run("the example of the documents runs", () =>
      until("the line of the example", () => /^kim hello kim\/\S+$/m.test(said), { last: () => said }));
    fs.rmSync(file);
    return results.sum();
  } finally {
    example?.kill();
    await up.stop();
  }
}

process.exit(await main());
