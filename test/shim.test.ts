import test from 'ava'
import { EpmoeError, type ShimEvent, shim } from 'epmoe'
import { emptyFolder, pythonTests } from './helpers/migration.js'
import { evaluate, python } from './helpers/python.js'

/** The serving stack in this process, with a switch that makes epmoe's sums wrong. */
const source = `
import sys, unittest
sys.path.insert(0, ${JSON.stringify(pythonTests)})
import torch
from serving_stack import Stack
from epmoe import generated, shim

shim.configure(max_overhead=0)  # at a rate of 1 every launch is to be compared
case = unittest.TestCase()
stack = Stack(case)
real = generated.post_reorder
spoiled = False

def post_reorder(**arguments):
    real(**arguments)
    if spoiled:
        arguments["output"] += 1

generated.post_reorder = post_reorder
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # compiled Triton takes nothing else
x, weights = torch.ones(2, 16, device=device), torch.ones(2, 2, device=device)
ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=device)

def serve(steps):
    for _ in range(steps):
        output, _, _ = stack.layer.forward(x, ids, weights, 4)
    return output.tolist()

def spoil(value):
    global spoiled
    spoiled = value

def kernel():
    return stack.layer.post_reorder_triton_kernel
`
const stack = python.exec(source)
const post = 'post_reorder_triton_kernel'

function serve(steps: number): unknown {
  using result = stack.method('serve', steps)
  return result.toJS()
}

function spoil(value: boolean): void {
  stack.method('spoil', value).dispose()
}

test.afterEach.always(() => {
  const one = shim()
  one.uninstall()
  one.setMode('*', 'epmoe')
  one.record(null)
  one.reset()
  spoil(false)
})

test.serial('installs, flips modes at run time and puts the same objects back', async (t) => {
  const expected = serve(1)
  using before = stack.method('kernel')
  const one = shim()
  t.is(shim(), one)
  t.false(one.installed)
  const { replaced, skipped } = one.install({ mode: 'shadow', modes: { pre_reorder: 'triton' } })
  t.true(replaced.some(({ kernel, module }) => kernel === post && module.endsWith('.layer')))
  t.deepEqual(skipped, [])
  t.true(one.installed)
  one.configure('*', { rate: 1, firstPerShape: 0, maxUlp: 2 })
  for (const [mode, count] of [
    ['shadow', 'matched'],
    ['epmoe', 'epmoe'],
    ['triton', 'triton'],
  ] as const) {
    one.reset()
    one.setMode('post_reorder', mode)
    t.is(one.getMode(post), mode)
    t.deepEqual(serve(3), expected)
    await one.flush() // a GPU's comparisons are fetched later
    t.like(one.stats()[post], { mode, launches: 3, [count]: 3, mismatches: 0, recordFailures: 0 })
  }
  t.is(one.getMode('pre_reorder'), 'triton')
  one.uninstall()
  using after = stack.method('kernel')
  t.is(after.address, before.address)
  t.throws(() => one.setMode('post_reorder', 'cuda' as never), { message: /triton, epmoe, shadow, off/ })
  t.throws(() => one.configure('*', { rate: 2 }), { message: /a number from 0 to 1/ })
})

test.serial('events arrive while Python serves on its own thread, and the event loop goes on', async (t) => {
  const folder = emptyFolder(t)
  const one = shim()
  one.install({ mode: 'shadow' })
  one.configure('*', { rate: 1, firstPerShape: 0, maxUlp: 2, tripAfter: 2 })
  one.record(folder, { minFreeBytes: 0 })
  spoil(true)
  let ticks = 0
  const clock = setInterval(() => ticks++, 1)
  const served = stack.methodAsync('serve', 5)
  const seen: ShimEvent[] = []
  for await (const event of one.events()) {
    seen.push(event)
    if (event.kind === 'tripped') break
  }
  ;(await served).dispose()
  clearInterval(clock)
  t.deepEqual(
    seen.map(({ kind, kernel }) => [kind, kernel]),
    [
      ['mismatch', post],
      ['mismatch', post],
      ['tripped', post],
    ],
  )
  t.regex(seen[0]!.what, /output: 32 of 32 differ/)
  t.true(seen[0]!.capsule?.startsWith(folder))
  t.true(ticks > 0)
  await one.flush()
  t.like(one.stats()[post], { mode: 'triton', chosenBy: 'tripped', mismatches: 2, recorded: 2 })
  const { timings } = one.stats()[post]!
  t.deepEqual(Object.keys(timings), ['T=2, K=2, H=16, float32'])
  t.true(
    Object.values(timings).every(
      ({ samples, tritonSeconds, epmoeSeconds }) => samples === 2 && tritonSeconds > 0 && epmoeSeconds > 0,
    ),
  )
})

test.serial('the queue is bounded, and what is dropped is counted', async (t) => {
  const one = shim()
  one.install({ mode: 'shadow' })
  one.configure('*', { rate: 1, firstPerShape: 0, maxUlp: 2, tripAfter: 0 })
  spoil(true)
  using events = one.events({ limit: 3 })
  serve(8)
  await one.flush()
  t.is(events.dropped, 5)
  const first = await events.next()
  serve(1)
  await one.flush()
  const numbers = [first.value!.number]
  for (let i = 0; i < 3; i++) numbers.push((await events.next()).value!.number)
  t.deepEqual(
    numbers.map((number) => number - numbers[0]!),
    [0, 1, 2, 3],
  )
  t.is(events.dropped, 5)
  t.throws(() => one.events({ limit: 0 }), { instanceOf: EpmoeError, message: /limit/ })
})

test.serial('waiting ends with the stream, by whatever ends it', async (t) => {
  const one = shim()
  const controller = new AbortController()
  const events = one.events({ signal: controller.signal })
  const waiting = events.next()
  controller.abort()
  t.true((await waiting).done)
  t.true((await events.next()).done)
  events.dispose()
  const second = one.events()
  const [a, b] = [second.next(), second.next()]
  second.dispose()
  t.deepEqual(
    (await Promise.all([a, b])).map(({ done }) => done),
    [true, true],
  )
  t.true((await one.events({ signal: AbortSignal.abort() }).next()).done)
  using listeners = evaluate('len(__import__("epmoe._shim.control").  _shim.control.events.listeners)')
  t.is(listeners.toJS(), 0)
})
