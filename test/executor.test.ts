import { setTimeout as sleep } from 'node:timers/promises'
import test from 'ava'
import { EpmoeError, job, kw, PythonError, Stream } from 'epmoe'
import { gpu } from './helpers/devices.js'
import { evaluate, python, torch, valueOf } from './helpers/python.js'

// One queue for the process: tests that fill it or count on it run one after the other.
const inTurn = test.serial

const time = python.import('time')
const facts = python.exec(`
import threading, time, torch, asyncio, epmoe
def where(): return [threading.get_ident(), threading.current_thread().name]
log = []
def note(x, seconds=0.0):
    time.sleep(seconds)
    log.append(x)
    return x
def count(limit):
    for i in range(limit):
        epmoe.report_progress({"step": i, "of": limit})
        time.sleep(0.001)
    return limit
def spin():
    try:
        epmoe.report_progress('running')
        while True: threading.get_ident()
    finally:
        log.append("spin ended")
def fails(): raise ValueError("on purpose")
async def soon(x, seconds=0.01):
    try:
        await asyncio.sleep(seconds)
        return x
    finally:
        log.append(("soon ended", x))
async def numbers(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i
    raise KeyError("after the last")
def plain(n):
    for i in range(n):
        time.sleep(0.001)
        yield i
`)

inTurn('asynchronous calls run in order on one thread that is not JavaScript’s', async (t) => {
  const names = await Promise.all([1, 2, 3].map(() => facts.methodAsync('where')))
  const idents = new Set(names.map((name) => JSON.stringify(name.toJS())))
  t.is(idents.size, 1)
  t.regex([...idents][0] ?? '', /epmoe-executor/)
  t.notDeepEqual(names[0]?.toJS(), facts.method('where').toJS())
  facts.get('log').method('clear')
  await Promise.all([facts.methodAsync('note', 'a', kw({ seconds: 0.05 })), facts.methodAsync('note', 'b')])
  t.deepEqual(facts.get('log').toJS(), ['a', 'b'])
})

inTurn('the event loop goes on under Python code that never pauses, and under torch', async (t) => {
  let largest = 0
  let last = performance.now()
  const timer = setInterval(() => {
    largest = Math.max(largest, performance.now() - last)
    last = performance.now()
  }, 5)
  let ticks = 0
  const ticker = setInterval(() => ticks++, 5)
  await python.evalAsync('sum(i * i for i in range(3_000_000))')
  await python.evalAsync('torch.ones(1500, 1500) @ torch.ones(1500, 1500)', { torch })
  clearInterval(timer)
  clearInterval(ticker)
  t.log(`largest gap ${largest.toFixed(1)} ms, ${ticks} ticks`)
  t.true(ticks > 3)
})

inTurn('errors arrive with type, message and traceback, and the queue goes on', async (t) => {
  const error = await t.throwsAsync(facts.methodAsync('fails'), { instanceOf: PythonError })
  t.is(error?.pythonType, 'ValueError')
  t.regex(error?.traceback ?? '', /fails/)
  for (const source of ['exec("raise SystemExit(3)")', 'exec("raise KeyboardInterrupt()")']) {
    await t.throwsAsync(python.evalAsync(source), { instanceOf: PythonError })
  }
  await t.throwsAsync(python.importAsync('no_such_module'), { instanceOf: PythonError })
  t.is((await facts.methodAsync('note', 7)).toJS(), 7)
})

inTurn('an error thrown by a JavaScript function keeps its identity through Python and back', async (t) => {
  const thrown = new RangeError('from JavaScript')
  const error = await t.throwsAsync(
    facts.methodAsync('plain', 1).then(() =>
      evaluate('lambda f: f(1)').callAsync(() => {
        throw thrown
      }),
    ),
    { instanceOf: PythonError },
  )
  t.is(error?.cause, thrown)
})

inTurn('a JavaScript function may be called from the executor and return a value', async (t) => {
  const result = await evaluate('lambda f: [f(i) for i in range(3)]').callAsync(
    (x: { toJS(): unknown }) => Number(x.toJS()) * 2,
  )
  t.deepEqual(result.toJS(), [0, 2, 4])
})

inTurn('a signal drops a job that waits', async (t) => {
  facts.get('log').method('clear')
  const controller = new AbortController()
  const first = facts.methodAsync('note', 'first', kw({ seconds: 0.1 }))
  const second = facts.methodAsync('note', 'second', job({ signal: controller.signal }))
  controller.abort(new Error('changed my mind'))
  await t.throwsAsync(second, { message: 'changed my mind' })
  await first
  await facts.methodAsync('note', 'third')
  t.deepEqual(facts.get('log').toJS(), ['first', 'third'])
  t.is(python.pending, 0)
})

inTurn('a signal interrupts Python code that runs, whose finally blocks run; the next job is not harmed', async (t) => {
  facts.get('log').method('clear')
  for (let round = 0; round < 20; round++) {
    const controller = new AbortController()
    const reason = new Error(`enough of ${round}`)
    const options = { signal: controller.signal, onProgress: () => controller.abort(reason) }
    t.is(await t.throwsAsync(facts.methodAsync('spin', job(options))), reason)
    t.is((await facts.methodAsync('note', round)).toJS(), round)
  }
  t.is((facts.get('log').toJS() as unknown[]).filter((entry) => entry === 'spin ended').length, 20)
})

inTurn('a signal that has been given refuses at once, and one given too late does nothing', async (t) => {
  await t.throwsAsync(facts.methodAsync('note', 1, job({ signal: AbortSignal.abort(new Error('before')) })), {
    message: 'before',
  })
  const controller = new AbortController()
  t.is((await facts.methodAsync('note', 2, job({ signal: controller.signal }))).toJS(), 2)
  controller.abort()
  t.is((await facts.methodAsync('note', 3)).toJS(), 3)
})

inTurn('the queue is bounded, says so, and tells when there is room', async (t) => {
  const limit = python.queueLimit
  python.queueLimit = 3
  try {
    const jobs = [1, 2, 3].map((x) => facts.methodAsync('note', x, kw({ seconds: 0.02 })))
    const error = await t.throwsAsync(facts.methodAsync('note', 4), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_QUEUE_FULL')
    t.is(python.pending, 3)
    await python.ready()
    t.true(python.pending < 3)
    t.is((await facts.methodAsync('note', 5)).toJS(), 5)
    await Promise.all(jobs)
    t.throws(
      () => {
        python.queueLimit = 0
      },
      { instanceOf: EpmoeError },
    )
  } finally {
    python.queueLimit = limit
  }
})

inTurn('progress arrives in order, and before the result', async (t) => {
  const seen: unknown[] = []
  const result = await facts.methodAsync('count', 5, job({ onProgress: (value) => seen.push(value) }))
  t.is(result.toJS(), 5)
  t.deepEqual(
    seen,
    [0, 1, 2, 3, 4].map((step) => ({ step, of: 5 })),
  )
})

inTurn('grad mode is per job and does not leak into the next', async (t) => {
  const enabled = evaluate('lambda: torch.is_grad_enabled()')
  t.is((await enabled.callAsync(job({ grad: false }))).toJS(), false)
  t.is((await enabled.callAsync()).toJS(), true)
  await evaluate('lambda: torch.set_grad_enabled(True)').callAsync(job({ grad: false }))
  t.is((await enabled.callAsync()).toJS(), true)
})

inTurn('options that are none are refused by name', async (t) => {
  for (const [options, argument] of [
    [{ signal: {} }, 'signal'],
    [{ grad: 1 }, 'grad'],
    [{ stream: 5 }, 'stream'],
    [{ onProgress: 'x' }, 'onProgress'],
  ] as const) {
    const error = await t.throwsAsync(facts.methodAsync('note', 1, job(options as never)), { instanceOf: EpmoeError })
    t.is(error?.argument, argument)
  }
})

inTurn('awaitables are awaited, also when they fail or are given up', async (t) => {
  t.is((await python.run(facts.method('soon', 5))).toJS(), 5)
  facts.get('log').method('clear')
  await t.throwsAsync(python.run(facts.method('soon', 6, 60), { signal: AbortSignal.timeout(20) }), {
    any: true,
    name: 'TimeoutError',
  })
  await facts.methodAsync('note', 'after')
  t.deepEqual(facts.get('log').toJS(), [['soon ended', 6], 'after'])
  const error = await t.throwsAsync(python.run(evaluate('5')), { instanceOf: PythonError })
  t.is(error?.pythonType, 'TypeError')
})

inTurn('iterators of either kind are iterated asynchronously, and what they raise arrives', async (t) => {
  const seen: unknown[] = []
  for await (const x of facts.method('plain', 3)) seen.push(x.toJS())
  const error = await t.throwsAsync(
    (async () => {
      for await (const x of facts.method('numbers', 3)) seen.push(x.toJS())
    })(),
    { instanceOf: PythonError },
  )
  t.is(error?.pythonType, 'KeyError')
  t.deepEqual(seen, [0, 1, 2, 0, 1, 2])
})

inTurn('libuv’s pool is left alone: the file system answers while Python sleeps', async (t) => {
  const { stat } = await import('node:fs/promises')
  const sleeping = Array.from({ length: 6 }, () => time.methodAsync('sleep', 0.05))
  let answered = false
  const asked = stat('.').then(() => {
    answered = true
  })
  await sleeping[0]
  await asked
  t.true(answered)
  await Promise.all(sleeping)
})

inTurn('with: the context is left however the block ends', async (t) => {
  const context = evaluate('torch.no_grad()')
  t.is(
    context.with(() => valueOf('torch.is_grad_enabled()')),
    false,
  )
  t.throws(
    () =>
      context.with(() => {
        throw new RangeError('inside')
      }),
    { instanceOf: RangeError },
  )
  t.is(valueOf('torch.is_grad_enabled()'), true)
  const suppress = evaluate('__import__("contextlib").suppress(Exception)')
  t.is(
    suppress.with(() => {
      throw new RangeError('swallowed')
    }),
    undefined,
  )
})

inTurn('memory of a JavaScript array stays while an asynchronous call reads it', async (t) => {
  const sums = await Promise.all(
    Array.from({ length: 50 }, (_, i) =>
      evaluate('lambda x: torch.frombuffer(x, dtype=torch.float32).sum().item()').callAsync(
        new Float32Array(10_000).fill(i),
      ),
    ),
  )
  t.deepEqual(
    sums.map((sum) => sum.toJS()),
    Array.from({ length: 50 }, (_, i) => i * 10_000),
  )
  await sleep(1)
})

if (gpu !== undefined) {
  const device = gpu
  inTurn('a job runs on the stream it is given, and the next one does not', async (t) => {
    using stream = Stream.create(device)
    const current = evaluate('lambda: torch.cuda.current_stream().cuda_stream')
    t.is((await current.callAsync(job({ stream }))).toJS(), stream.address)
    t.not((await current.callAsync()).toJS(), stream.address)
    t.is((await evaluate('lambda: torch.cuda.current_device()').callAsync(job({ device }))).toJS(), 0)
  })
}
