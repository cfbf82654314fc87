import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import test from 'ava'
import { EpmoeError, type PyRef, postReorder, scope, stats, Tensor } from 'epmoe'
import { validCall } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'
import { run } from './helpers/embedded.js'
import { evaluate, python, torch, valueOf } from './helpers/python.js'

// Counters are the process's: one test at a time.
const inTurn = test.serial

for (const device of testDevices) {
  inTurn(`a scope disposes what was made in it, and keeps what it returns, on ${device}`, (t) => {
    const before = stats()
    const kept = scope(() => {
      Tensor.zeros([1000], { device })
      evaluate('torch.ones(10)').get('shape')
      return { one: Tensor.zeros([5], { device }), more: [torch.method('ones', 3)] }
    })
    t.is(stats().devices[device]?.tensors, (before.devices[device]?.tensors ?? 0) + 1)
    t.is(stats().python.refs, before.python.refs + 1)
    t.false(kept.one.disposed)
    t.is(valueOf('x.sum().item()', { x: kept.more[0] }), 3)
    kept.one.dispose()
    kept.more[0]?.dispose()
    t.deepEqual(
      [stats().devices[device]?.tensors ?? 0, stats().python.refs],
      [before.devices[device]?.tensors ?? 0, before.python.refs],
    )
  })
}

inTurn('scopes nest, end when their body throws, and follow a body through its awaits', async (t) => {
  const before = stats().cpu.tensors
  const outer = scope(() => {
    const inner = scope(() => Tensor.zeros([4]))
    t.false(inner.disposed)
    return [inner]
  })
  t.false(outer[0]?.disposed)
  outer[0]?.dispose()
  let seen: Tensor | undefined
  t.throws(
    () =>
      scope(() => {
        seen = Tensor.zeros([4])
        throw new RangeError('inside')
      }),
    { instanceOf: RangeError },
  )
  t.true(seen?.disposed)
  const results = await Promise.all(
    [1, 2, 3].map((i) =>
      scope(async () => {
        const first = Tensor.zeros([i])
        await sleep(5 - i)
        const second = Tensor.zeros([i])
        t.false(first.disposed)
        return second
      }),
    ),
  )
  t.is(stats().cpu.tensors, before + 3)
  for (const result of results) result.dispose()
  await t.throwsAsync(
    scope(async () => {
      Tensor.zeros([4])
      await sleep(1)
      throw new RangeError('later')
    }),
    { instanceOf: RangeError },
  )
  t.is(stats().cpu.tensors, before)
})

inTurn('results of asynchronous calls belong to the scope of the call', async (t) => {
  const before = stats().python.refs
  const kept = await scope(async () => {
    const made = await Promise.all([1, 2, 3].map((i) => torch.methodAsync('ones', i)))
    return made[0]
  })
  t.is(stats().python.refs, before + 1)
  kept?.dispose()
})

inTurn('disposing twice is harmless; using what was disposed is an error that says so', (t) => {
  const tensor = Tensor.zeros([3])
  const ref = torch.method('ones', 3)
  for (const each of [tensor, ref]) {
    each.dispose()
    each.dispose()
  }
  for (const use of [
    () => tensor.data,
    () => tensor.toTorch(),
    () => ref.get('shape'),
    () => ref.call(),
    () => ref.address,
    () => valueOf('x', { x: ref }),
  ]) {
    t.is(t.throws(use, { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
  }
})

inTurn('stats count tensors and bytes by device, and what Python objects hold', (t) => {
  const before = stats()
  const tensor = Tensor.zeros([1000], { dtype: 'float64' })
  const view = tensor.view([500])
  const ref = torch.method('ones', [1000, 1000])
  t.is(stats().cpu.tensors, before.cpu.tensors + 2)
  t.is(stats().cpu.bytes, before.cpu.bytes + 8000)
  t.is(stats().devices.cpu?.bytes, stats().cpu.bytes)
  t.is(stats().python.refs, before.python.refs + 1)
  t.is(stats().python.bytes, before.python.bytes + 4_000_000)
  for (const each of [tensor, view, ref]) each.dispose()
  t.deepEqual(stats(), before)
})

inTurn('memory lives as long as its last holder, whichever side that is on', async (t) => {
  const tensor = Tensor.from(new Float32Array([1, 2, 3]))
  const viewed = tensor.toTorch() as PyRef
  tensor.dispose()
  t.deepEqual(viewed.method('tolist').toJS(), [1, 2, 3])
  const source = evaluate('torch.arange(4.0)')
  const borrowed = Tensor.fromTorch(source)
  source.dispose()
  valueOf('__import__("gc").collect()')
  t.deepEqual([...(borrowed.data as Float32Array)], [0, 1, 2, 3])
  // Disposed while an asynchronous call reads it: the call holds its own.
  const large = Tensor.from(new Float32Array(1_000_000).fill(2))
  const sum = evaluate('lambda x: (__import__("time").sleep(0.05), x.sum().item())[1]').callAsync(large)
  large.dispose()
  t.is((await sum).toJS(), 2_000_000)
  viewed.dispose()
  borrowed.dispose()
})

inTurn('a call on a tensor disposed by a getter of its own arguments is refused', (t) => {
  const call = validCall('cpu')
  const sly = {
    ...call,
    get output() {
      call.src2dst.dispose()
      return call.output
    },
  }
  t.is(t.throws(() => postReorder(sly), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
})

/** Peak resident memory, in MB, of a process that makes 60 tensors of 64 MB each, letting go of them as `body` says. */
function peak(body: string): number {
  return run(`
    import { scope } from 'epmoe'
    const torch = startPython().import('torch')
    let peak = 0
    for (let i = 0; i < 60; i++) {
      ${body}
      peak = Math.max(peak, process.memoryUsage.rss())
      await new Promise((resolve) => setImmediate(resolve))
    }
    console.log(JSON.stringify(Math.round(peak / 1e6)))`) as number
}

inTurn('a long loop of synchronous calls needs no turn of the event loop to give its memory back', (t) => {
  const tensor = torch.method('zeros', 4)
  const loop = () => {
    for (let i = 0; i < 100_000; i++) tensor.method('add', 1).dispose()
    return process.memoryUsage.rss()
  }
  const before = loop()
  loop()
  const grown = loop() - before
  t.true(grown < 100e6, `${(grown / 1e6).toFixed()} MB more after 200,000 calls`)
  tensor.dispose()
})

/** How often V8 collects everything in a process that makes tensors of 128 MB in `body`, 100 times. */
function collections(body: string): number {
  return run(`
    import { constants, PerformanceObserver } from 'node:perf_hooks'
    import { scope, Tensor } from 'epmoe'
    const torch = startPython().import('torch')
    const turn = () => new Promise((resolve) => setImmediate(resolve))
    const seen = []
    const observer = new PerformanceObserver((list) => seen.push(...list.getEntries()))
    await turn()
    observer.observe({ entryTypes: ['gc'] })
    for (let i = 0; i < 100; i++) { ${body} }
    for (let i = 0; i < 3; i++) await turn()
    console.log(seen.filter(({ detail }) => detail.kind === constants.NODE_PERFORMANCE_GC_MAJOR).length)`) as number
}

inTurn('what comes and goes within a turn of the event loop has V8 collect nothing', (t) => {
  t.timeout(120_000)
  for (const make of [`torch.method('empty', 2 ** 25)`, 'Tensor.empty([2 ** 25])']) {
    const withinTurn = collections(`scope(() => { for (let j = 0; j < 4; j++) ${make} })`)
    const overTurns = collections(`for (let j = 0; j < 4; j++) ${make}; await turn()`)
    t.log(`${make}: ${withinTurn} full collections; left to the collector ${overTurns}`)
    t.true(withinTurn < 5)
    t.true(overTurns >= 5, 'the control')
  }
})

inTurn('two-dimensional tensors do not pile up: at once with a scope, in good time without', (t) => {
  t.timeout(120_000)
  const scoped = peak(`scope(() => { torch.method('ones', [4096, 4096]) })`)
  const collected = peak(`torch.method('ones', [4096, 4096])`)
  t.log(`peak with a scope ${scoped} MB, left to the collector ${collected} MB, of 4027 MB made`)
  t.true(scoped < 900, `${scoped} MB`)
  t.true(collected < 2500, `${collected} MB`)
})

inTurn('finalisers let go of what nobody disposed', async (t) => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const before = stats()
  for (let i = 0; i < 500; i++) {
    python.eval('object()')
    Tensor.zeros([10])
  }
  t.true(stats().python.refs >= before.python.refs + 500)
  const left = () => stats().cpu.tensors > before.cpu.tensors + 10 || stats().python.refs > before.python.refs + 10
  for (let round = 0; round < 50 && left(); round++) {
    collect()
    await sleep(5)
  }
  t.true(stats().python.refs <= before.python.refs + 10, `${stats().python.refs - before.python.refs} refs are left`)
  t.true(stats().cpu.tensors <= before.cpu.tensors + 10)
})
