// Two users through the whole app at `/` in Chromium, by Playwright: `node tests/browser/stories/run.mjs NATTER [--only TEXT]...
// [--pictures FOLDER] [--no-figures]`. It starts `natter up` with two edges and data of its own on free ports, and takes it down again.
// After each story what is on screen must equal the history of the API: each message once, in order. Then figures of the page: sizes
// are limits, times are only told. Its last line is `N passed, N failed`; exit code 77 where there is no Chromium.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import { parseArgs } from "node:util";

import { Results, Up, findChromium } from "../../clients/support.mjs";
import { figures, pictures } from "./figures.mjs";
import { CONFIG, Story, launch } from "./harness.mjs";
import { LAST, LONG, STORIES } from "./stories.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { only: { type: "string", multiple: true }, pictures: { type: "string" }, "no-figures": { type: "boolean" } },
});
const [binary] = positionals;
if (!binary) {
  console.error("usage: node run.mjs NATTER [--only TEXT]... [--pictures FOLDER] [--no-figures]");
  process.exit(64);
}
const executable = findChromium();
if (!executable) {
  console.log("skipped: no Chromium to test in");
  process.exit(77);
}

const wanted = (deed) => !values.only || values.only.some((text) => deed.name.includes(text));
const results = new Results();
const up = await Up.start(binary, { config: CONFIG, edges: 2, mongodb: true });
let browser;
try {
  browser = await launch(executable);
  const run = async (deed) => {
    const story = new Story({ up, browser });
    try {
      await results.run(deed.name.replaceAll("_", " "), () => deed(story));
    } finally {
      await story.close();
    }
  };
  const waiting = LONG.filter(wanted).map(run);
  for (const deed of STORIES.filter(wanted)) await run(deed);
  await Promise.all(waiting);
  for (const deed of LAST.filter(wanted)) await run(deed);
  if (!values["no-figures"] && wanted(figures)) await run(figures);
  if (values.pictures) {
    await run(async function pictures_of_the_main_states(story) {
      await pictures(story, values.pictures);
    });
  }
} finally {
  await browser?.close();
  await up.stop();
}
process.exitCode = results.sum();
