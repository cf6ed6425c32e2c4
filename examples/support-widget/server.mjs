// `npm start`: a product page with a support chat, and the back end that it needs (../backend). esbuild makes one script of the page.
import fs from "node:fs/promises";
import { createServer } from "node:http";

import { build } from "esbuild";

import { reach, secret, settings } from "../backend/settings.mjs";
import { support } from "../backend/support.mjs";

const { url, port } = settings;
await reach(url);
const here = (name) => new URL(`page/${name}`, import.meta.url);
const { outputFiles } = await build({
  entryPoints: [here("main.jsx").pathname],
  bundle: true,
  minify: true,
  format: "esm",
  jsx: "automatic",
  // One React: that of this folder, also for the SDK, which is linked and may have another one for its tests.
  alias: { react: new URL("node_modules/react", import.meta.url).pathname },
  define: { "process.env.NODE_ENV": '"production"' },
  write: false,
  logLevel: "warning",
});
const socket = url.replace(/^http/, "ws");
const files = {
  "/": ["text/html; charset=utf-8", await fs.readFile(here("index.html"))],
  "/page.css": ["text/css; charset=utf-8", await fs.readFile(here("page.css"))],
  "/page.js": ["text/javascript; charset=utf-8", outputFiles[0].contents],
};
const policy = `default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ${url} ${socket}; base-uri 'none'; form-action 'none'`;

const desk = support({ ...settings, secret: secret() });
createServer(async (request, response) => {
  if (await desk.handle(request, response)) return;
  const file = request.method === "GET" && files[request.url.split("?")[0]];
  if (!file) return response.writeHead(404).end();
  const [type, content] = file;
  response.writeHead(200, { "content-type": type, "content-security-policy": policy, "cache-control": "no-cache" }).end(content);
})
  .on("error", (error) => {
    console.error(`Port ${port}: ${error.message}. Another one: PORT=3001 npm start (and the same port in natter.toml)`);
    process.exit(1);
  })
  .listen(port, "127.0.0.1", async () => {
    console.log(`shop: http://127.0.0.1:${port}/  natter: ${url}`);
    console.log(`operators: ${await desk.operatorLink()}`);
  });
