import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { inParallel } from './helpers/in-parallel.js'
import { torchGpu } from './helpers/python.js'

const root = fileURLToPath(new URL('..', import.meta.url))

interface Ending {
  code: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
  seconds: number
}

/** Runs a program that has Python, torch, an atexit function and unflushed output, and then does `body`. */
function run(body: string, kill?: NodeJS.Signals): Promise<Ending> {
  const program = `
    import { startPython, Tensor } from 'epmoe'
    const python = startPython()
    process.on('exit', (code) => console.log('an exit listener was told', code))
    const torch = python.import('torch')
    const m = python.exec(\`
import atexit, sys, threading, time, torch
sys.stdout.reconfigure(line_buffering=False, write_through=False)
atexit.register(lambda: print("atexit ran"))
print("before the end")
def spin():
    while True: threading.get_ident()
def multiply(seconds=30):
    a, end = torch.ones(400, 400, requires_grad=True), time.monotonic() + seconds
    while time.monotonic() < end: (a @ a).sum().backward()
def multiply_on_gpu():
    a = torch.ones(2000, 2000, device="cuda", requires_grad=True)
    while True: (a @ a).sum().backward(); torch.cuda.synchronize()
def later(seconds):
    time.sleep(seconds)
    print("later is over")
def thread(function, daemon, *args): threading.Thread(target=function, args=args, daemon=daemon).start()
\`)
    const tick = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
    ${body}`
  const child = spawn(
    process.execPath,
    ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program],
    { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] },
  )
  return new Promise((resolve) => {
    let stdout = ''
    let stderr = ''
    let begin = performance.now()
    child.stdout.on('data', (data) => {
      stdout += data
      if (!String(data).includes('READY')) return
      begin = performance.now()
      if (kill !== undefined) child.kill(kill)
    })
    child.stderr.on('data', (data) => {
      stderr += data
    })
    child.on('close', (code, signal) =>
      resolve({ code, signal, stdout, stderr, seconds: (performance.now() - begin) / 1000 }),
    )
  })
}

/** What Python is busy with when the end comes. `finishes`: left alone, it comes to an end by itself. */
const loads: Record<string, { start: string; finishes: boolean }> = {
  'nothing under way': { start: '', finishes: true },
  'a job that sleeps': { start: `m.methodAsync('later', 0.5).catch(() => {}); await tick(50);`, finishes: true },
  'a job in Python code': { start: `m.methodAsync('spin').catch(() => {}); await tick(50);`, finishes: false },
  'a job inside torch’s autograd': {
    start: `m.methodAsync('multiply').catch(() => {}); await tick(50);`,
    finishes: false,
  },
  'a daemon thread inside torch’s autograd': {
    start: `m.method('thread', m.get('multiply'), true); await tick(50);`,
    finishes: true,
  },
  'tensors of either side alive on the other': {
    start: `globalThis.kept = [Tensor.fromTorch(torch.method('ones', 5)), Tensor.zeros([5]).toTorch()];`,
    finishes: true,
  },
  ...(torchGpu === undefined
    ? {}
    : {
        'work on the GPU under way, with graphs, events and tensors of either side': {
          start: `
            const { Event, Graph, postReorder, Stream } = await import('epmoe')
            const { validCall } = await import('./test/helpers/call.ts')
            const call = validCall('${torchGpu}')
            const stream = Stream.create('${torchGpu}')
            const graph = Graph.capture(stream, () => postReorder(call))
            python.eval('torch.cuda._sleep(200_000_000)', { torch }).dispose()
            stream.wait(Event.create('${torchGpu}').record(Stream.torchCurrent('${torchGpu}')))
            graph.replay()
            stream.synchronize().catch(() => {})
            globalThis.kept = [call, graph, call.output.toTorch(), Tensor.fromTorch(python.eval('torch.ones(5, device="cuda")', { torch }))];`,
          finishes: true,
        },
        'a job that keeps the GPU busy': {
          start: `m.methodAsync('multiply_on_gpu').catch(() => {}); await tick(500);`,
          finishes: false,
        },
      }),
  'an ordinary thread': { start: `m.method('thread', m.get('later'), false, 0.3);`, finishes: true },
}

const endings: Record<string, { body: string; code: number; said?: RegExp }> = {
  'natural end': { body: '', code: 0 },
  'process.exit(7)': { body: 'process.exit(7)', code: 7 },
  'process.exitCode = 5': { body: 'process.exitCode = 5', code: 5 },
  'an uncaught error': { body: `throw new RangeError('nobody catches this')`, code: 1, said: /nobody catches this/ },
  'an unhandled rejection': {
    body: `Promise.reject(new RangeError('nobody awaits this')); await tick(1e6)`,
    code: 1,
    said: /nobody awaits this/,
  },
}

for (const [load, { start, finishes }] of Object.entries(loads)) {
  for (const [ending, { body, code, said }] of Object.entries(endings)) {
    // Node does not end by itself while a job runs.
    if (!finishes && (ending === 'natural end' || ending === 'process.exitCode = 5')) continue
    test(`${ending}, ${load}: the right code, output flushed, no crash, no hang`, async (t) => {
      t.timeout(240_000)
      const result = await inParallel(() => run(`${start} console.log('READY'); ${body}`))
      const told = JSON.stringify(result)
      t.is(result.signal, null, told)
      t.is(result.code, code, told)
      t.true(result.seconds < 6, told)
      t.regex(result.stdout, /before the end/, told)
      t.regex(result.stdout, /atexit ran/, told)
      t.regex(result.stdout, new RegExp(`an exit listener was told ${code}\n`), told)
      if (said !== undefined) t.regex(result.stderr, said)
    })
  }
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    test(`${signal}, ${load}: Node's own answer`, async (t) => {
      t.timeout(240_000)
      const result = await inParallel(() => run(`${start} console.log('READY'); await tick(1e6)`, signal))
      t.is(result.signal, signal, JSON.stringify(result))
      t.true(result.seconds < 3, JSON.stringify(result))
    })
  }
}

test('a SIGINT handler is called while a job runs, and may go on', async (t) => {
  t.timeout(240_000)
  const body = `process.on('SIGINT', () => { console.log('interrupted'); job.then(() => process.exit(8)) })
    const job = m.methodAsync('later', 1); await tick(50); console.log('READY'); await tick(1e6)`
  const result = await inParallel(() => run(body, 'SIGINT'))
  t.is(result.code, 8, JSON.stringify(result))
  t.regex(result.stdout, /interrupted[\s\S]*later is over/)
  t.regex(result.stdout, /atexit ran/)
})

test('a SIGTERM handler that exits runs Python’s end as well', async (t) => {
  t.timeout(240_000)
  const body = `process.on('SIGTERM', () => process.exit(9)); m.methodAsync('spin').catch(() => {}); console.log('READY'); await tick(1e6)`
  const result = await inParallel(() => run(body, 'SIGTERM'))
  t.is(result.code, 9, JSON.stringify(result))
  t.regex(result.stdout, /atexit ran/)
})

test('an exit listener that throws beside a busy thread is told of, and the code is that of Node', async (t) => {
  t.timeout(240_000)
  const body = `process.on('exit', () => { throw new RangeError('thrown at exit') })
    ${loads['a daemon thread inside torch’s autograd']?.start}`
  const result = await inParallel(() => run(body))
  t.is(result.code, 1, JSON.stringify(result))
  t.regex(result.stderr, /thrown at exit/)
})
