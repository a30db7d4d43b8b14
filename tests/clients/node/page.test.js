// The page at / in headless Chromium: it asks nobody but its server, answers as the model does, and draws what the
// server does.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const { EPSMOE_BASE_URL, EPSMOE_API_KEY, EPSMOE_SCRATCH } = process.env;
const options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
let browser;

before(async () => {
  browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: options });
});
after(() => browser.close());

async function open(colorScheme, width = 1280) {
  const page = await browser.newPage({ colorScheme, viewport: { width, height: 1000 } });
  const problems = [], strangers = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("request", (request) => request.url().startsWith(EPSMOE_BASE_URL) || strangers.push(request.url()));
  await page.goto(EPSMOE_BASE_URL);
  return { page, problems, strangers };
}

async function ask(page, question, most) {
  await page.evaluate(() => document.querySelector("details").setAttribute("open", ""));
  await page.fill("#key", EPSMOE_API_KEY);
  await page.fill("#most", String(most));
  await page.fill("#question", question);
  await page.press("#question", "Enter");
}

test("a question is answered, bit by bit", async () => {
  const { page, problems, strangers } = await open("light");
  await page.waitForSelector("#state.ready");
  await page.evaluate(() => {
    window.lengths = [];
    new MutationObserver(() => {
      const line = document.querySelector(".said.assistant");
      if (line) window.lengths.push(line.textContent.length);
    }).observe(document.getElementById("talk"), { childList: true, subtree: true, characterData: true });
  });
  await ask(page, "Say something.", 300);
  await page.waitForFunction(() => document.getElementById("send").textContent === "Send", null, { timeout: 60000 });
  const lengths = await page.evaluate(() => window.lengths);
  assert.ok(new Set(lengths).size > 3, `the answer came in ${new Set(lengths).size} pieces`);
  const asked = { messages: [{ role: "user", content: "Say something." }], max_tokens: 300, temperature: 0 };
  await page.click("#clear");
  await page.fill("#temperature", "0");
  await ask(page, "Say something.", 300);
  await page.waitForFunction(() => document.getElementById("send").textContent === "Send", null, { timeout: 60000 });
  const headers = { authorization: `Bearer ${EPSMOE_API_KEY}`, "content-type": "application/json" };
  const answer = await fetch(`${EPSMOE_BASE_URL}/v1/chat/completions`, { method: "POST", headers, body: JSON.stringify(asked) });
  const { content } = (await answer.json()).choices[0].message;
  assert.equal(await page.textContent(".said.assistant"), content);
  assert.deepEqual(problems, []);
  assert.deepEqual(strangers, []);
  await page.close();
});

test("what went wrong is said", async () => {
  const { page } = await open("light");
  await page.fill("#question", "Say something.");
  await page.click("#send");
  assert.match(await page.textContent(".said.error"), /key/);
  await page.close();
});

// What a page asks for is shown of the next steps, and it asks once a second.
async function untilDrawn(page) {
  await page.waitForSelector("#state.ready");
  await ask(page, "Say something.", 300);
  await page.waitForSelector("#lanes rect", { state: "attached", timeout: 30000 });
}

test("a narrow window is wide enough", async () => {
  const { page, problems } = await open("light", 390);
  await untilDrawn(page);
  const { wide, height } = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth,
    height: Math.min(...[...document.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height)),
  }));
  assert.ok(wide <= 390, `the page is ${wide} wide`);
  assert.ok(height >= 10, `its smallest text is ${height} high`);
  assert.deepEqual(problems, []);
  await page.close();
});

for (const colorScheme of ["light", "dark"]) {
  test(`what the server does is drawn, ${colorScheme}`, async () => {
    const { page, problems } = await open(colorScheme);
    await untilDrawn(page);
    await page.waitForSelector("#rates polyline", { state: "attached" });
    await page.waitForFunction(() => document.getElementById("heat").width > 1, null, { timeout: 30000 });
    assert.ok((await page.locator("#ranks tr").count()) >= 1);
    await page.waitForTimeout(1500);
    await page.screenshot({ path: `${EPSMOE_SCRATCH}/page-${colorScheme}.png`, fullPage: true });
    assert.deepEqual(problems, []);
    await page.close();
  });
}
