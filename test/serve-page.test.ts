import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import anyTest, { type TestFn } from 'ava'
import { chromium, type Page } from 'playwright-core'
import { complete, start, whyNot } from './helpers/serve.js'

const browser = '/usr/bin/chromium'
const reason = existsSync(browser) ? whyNot() : 'there is no Chromium: apt-get install -y chromium'
const test = (reason === undefined ? anyTest : anyTest.skip) as TestFn
if (reason !== undefined) anyTest(`the page is not looked at: ${reason}`, (t) => t.pass())

const flags = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]

test('the page shows requests, tokens and shadow counts while they come, and switches the mode', async (t) => {
  const server = await start()
  t.teardown(() => server.close())
  const profile = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: browser,
    headless: true,
    args: flags,
  })
  t.teardown(async () => {
    await context.close()
    rmSync(profile, { recursive: true, force: true })
  })
  const page = await context.newPage()
  const problems: string[] = []
  page.on('pageerror', (error) => problems.push(error.message))
  page.on('console', (message) => message.type() === 'error' && problems.push(message.text()))
  await page.goto(server.url)
  await says(page, '#state', 'serving')
  await says(page, '#model', `qwen3-moe (Qwen3MoeForCausalLM, float32 on ${server.model.facts.device})`)
  await says(page, '#tokens', '0')
  t.is(await page.getAttribute('[data-mode=epmoe]', 'aria-pressed'), 'true')

  await complete(server, 'Hello', { max_tokens: 8 })
  await says(page, '#tokens', '8')
  await says(page, '#done', '1')
  t.is(await page.textContent('#close'), '0')

  await page.click('[data-mode=shadow]')
  await page.waitForSelector('[data-mode=shadow][aria-pressed=true]')
  t.is(server.model.mode, 'shadow')
  await complete(server, 'Hello', { max_tokens: 8 })
  await says(page, '#done', '2')
  const { identical, close } = server.metrics.totals.shadow
  t.is(identical + close, 8 * 3)
  await says(page, '#close', String(close))
  await says(page, '#worse', '0')
  t.regex((await page.textContent('#share')) ?? '', /^[1-9]\d? %$/)
  // Its policy allows nothing from elsewhere, and nothing on the page wants it.
  t.deepEqual(problems, [])
  t.is(
    await page.evaluate(() =>
      fetch('https://example.invalid/').then(
        () => 'fetched',
        () => 'refused',
      ),
    ),
    'refused',
  )
})

/** Waits until an element has this text. */
async function says(page: Page, selector: string, text: string): Promise<void> {
  await page.waitForFunction(
    ([at, wanted]) => (globalThis as unknown as Shown).document.querySelector(at!)?.textContent === wanted,
    [selector, text],
  )
}

/** Of the browser's world only what is used here: the types of the rest are not loaded. */
interface Shown {
  document: { querySelector(selector: string): { textContent: string } | null }
}
