// Opens pages in a real browser, wide and narrow, light and dark: a screenshot of each, the accessibility
// rules of axe-core, and what a reader would stumble over: small or clipped letters of charts, a page that
// scrolls sideways, requests, errors of scripts. Usage: check.mjs CHROMIUM OUT PAGE...
import { createRequire } from "node:module";
import { mkdirSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const [executablePath, out, ...pages] = process.argv.slice(2);
const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const WIDTHS = [420, 900, 1400];
const SCHEMES = ["light", "dark"];
const LEAST_LETTER = 11;
mkdirSync(out, { recursive: true });

// In the page: what is too small, clipped or too wide. Charts that are not shown have no rectangle.
function look(least) {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
  for (const text of document.querySelectorAll("svg.chart text")) {
    if (!text.getClientRects().length) continue;
    const size = parseFloat(getComputedStyle(text).fontSize) * Math.abs(text.ownerSVGElement.getScreenCTM().a);
    if (size < least) found.push(`letters of ${size.toFixed(1)} px: ${text.textContent}`);
    const [inner, outer] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
    const over = Math.max(outer.left - inner.left, inner.right - outer.right, outer.top - inner.top, inner.bottom - outer.bottom);
    if (over > 1) found.push(`clipped by ${over.toFixed(0)} px: ${text.textContent}`);
  }
  // A caption stays in view while its table scrolls.
  for (const scroll of document.querySelectorAll(".scroll")) {
    const over = (part) => part.getBoundingClientRect().right - scroll.getBoundingClientRect().right;
    for (const part of scroll.querySelectorAll("caption div")) {
      if (part.getClientRects().length && over(part) > 1) found.push(`cut by ${over(part).toFixed(0)} px: ${part.textContent.slice(0, 60)}`);
    }
    // A dot and its name are on one line.
    for (const dot of scroll.querySelectorAll("tbody th .dot")) {
      const name = document.createRange();
      name.selectNodeContents(dot.parentElement);
      name.setStartAfter(dot);
      const [at, first] = [dot.getBoundingClientRect(), name.getClientRects()[0]];
      if (at.width && first && (at.bottom < first.top || at.top > first.bottom)) found.push(`a dot is not beside its name: ${name}`);
    }
  }
  for (const key of document.querySelectorAll("tbody th code")) {
    if (key.getClientRects().length > 2) found.push(`a key in ${key.getClientRects().length} pieces: ${key.textContent}`);
  }
  // Where a column may be wide, no word has a line of its own.
  for (const cell of document.querySelectorAll(".stages td")) {
    if (!cell.getClientRects().length || cell.textContent.length < 25) continue;
    const width = cell.getBoundingClientRect().width;
    if (width < 120) found.push(`a column of ${width.toFixed(0)} px: ${cell.textContent.slice(0, 60)}`);
  }
  return found;
}

const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--hide-scrollbars"] });
let faults = 0;
for (const page of pages) {
  for (const scheme of SCHEMES) {
    for (const width of WIDTHS) {
      const name = `${basename(page, ".html")}-${width}-${scheme}`;
      const tab = await browser.newPage();
      const found = [];
      tab.on("pageerror", (error) => found.push(`script: ${error.message}`));
      tab.on("request", (request) => /^(file|data|blob):/.test(request.url()) || found.push(`request: ${request.url()}`));
      await tab.setViewport({ width, height: 900 });
      await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await tab.goto(pathToFileURL(resolve(page)).href);
      // Folded parts count as well.
      await tab.evaluate(() => document.querySelectorAll("details").forEach((d) => (d.open = true)));
      found.push(...(await tab.evaluate(look, LEAST_LETTER)));
      await tab.addScriptTag({ path: axe });
      const { violations } = await tab.evaluate(() => window.axe.run());
      for (const v of violations) found.push(`${v.id} (${v.impact}) x${v.nodes.length}: ${v.help}; ${v.nodes[0].target}`);
      await tab.evaluate(() => document.querySelectorAll("details").forEach((d) => (d.open = false)));
      await tab.screenshot({ path: join(out, `${name}.png`), fullPage: true });
      await tab.close();
      console.log(`${name}: ${found.length ? `${found.length} faults` : "ok"}`);
      found.slice(0, 20).forEach((fault) => console.log(`  ${fault}`));
      faults += found.length;
    }
  }
}
await browser.close();
process.exitCode = faults ? 1 : 0;
