// `npm start`: the back end alone. The support widget's server runs it together with its page.
import { createServer } from "node:http";

import { reach, secret, settings } from "./settings.mjs";
import { support } from "./support.mjs";

const { url, port } = settings;
await reach(url);
const desk = support({ ...settings, secret: secret() });
createServer(async (request, response) => {
  if (!(await desk.handle(request, response))) response.writeHead(404).end();
})
  .on("error", (error) => {
    console.error(`Port ${port}: ${error.message}. Another one: PORT=3001 npm start`);
    process.exit(1);
  })
  .listen(port, "127.0.0.1", async () => {
    console.log(`back end: http://127.0.0.1:${port}  natter: ${url}`);
    console.log(`operators: ${await desk.operatorLink()}`);
  });
