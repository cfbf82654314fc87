// A kernel that fails takes the CUDA context with it: everybody is told, again and again, and nobody crashes.
import { spawnSync } from 'node:child_process'
import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { findNvcc } from '../src/setup/native.mjs'
import { gpu, standIn } from './helpers/devices.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const nvcc = findNvcc()
const faultTest = standIn || (gpu !== undefined && nvcc !== undefined) ? test : test.skip
if (!standIn && (gpu === undefined || nvcc === undefined)) {
  test('a GPU and nvcc are needed for the other tests of this file', (t) => {
    t.log('skipped: test/stand-in.test.ts runs them on a GPU that a stand-in plays')
    t.pass()
  })
}

/** JavaScript by which a kernel fails. */
function fault(): string {
  if (standIn) return `new Op('trap').call({ output: Tensor.empty([1], { device: '${gpu}' }) })`
  const library = join(mkdtempSync(join(tmpdir(), 'epmoe-fault-')), 'fault.so')
  const source = join(root, 'test/fixtures/fault/fault.cu')
  const args = ['-arch=native', '-shared', '-Xcompiler=-fPIC', '-o', library, source]
  const { status, stderr } = spawnSync(nvcc?.path ?? 'nvcc', args, { encoding: 'utf8' })
  if (status !== 0) throw new Error(stderr)
  return `python.eval('__import__("ctypes").CDLL(path).fault()', { path: ${JSON.stringify(library)} })`
}

/** Runs a program in which `device` is the GPU, and `told` collects the codes of errors. */
function run(body: string) {
  const program = `
    import { Event, Graph, postReorder, startPython, Stream, Tensor } from 'epmoe'
    import { Op } from './src/call.ts'
    import { validCall } from './test/helpers/call.ts'
    const device = '${gpu}'
    const python = startPython()
    const torch = python.import('torch')
    python.exec('import atexit\\natexit.register(lambda: print("atexit ran"))')
    const errors = []
    const attempt = async (what) => { try { await what(); errors.push('no error') } catch (error) { errors.push(error) } }
    const call = validCall(device)
    const stream = Stream.create(device)
    const event = Event.create(device).record(stream)
    const prepared = postReorder.prepare(call)
    const graph = Graph.capture(stream, () => postReorder(call))
    const fault = () => { ${fault()} }
    ${body}`
  const args = ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program]
  return spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8', timeout: 120_000 })
}

faultTest(
  'a failed kernel is an error that names it and says that the context is lost, for as long as one asks',
  (t) => {
    t.timeout(300_000)
    const { status, signal, stdout, stderr } = run(`
    await attempt(() => stream.synchronize())
    fault()
    await attempt(() => Stream.own(device).synchronize())
    const calls = [
      () => postReorder(call),
      () => prepared.run(),
      () => graph.replay(),
      () => call.output.toHost(),
      () => call.output.toHostSync(),
      () => event.synchronize(),
      () => stream.synchronizeSync(),
      () => Tensor.empty([5], { device }),
      () => Graph.capture(stream, () => postReorder(call)),
    ]
    for (const each of [...calls, ...calls]) await attempt(each)
    console.log(JSON.stringify(errors.map((error) => error.code ?? error)))
    console.log(errors[1].message)
    // The CPU goes on, Python too, and what lived on the GPU can be let go of.
    const host = validCall('cpu')
    postReorder(host)
    console.log(String(host.output.data[0]), torch.method('ones', 3).method('sum').method('item').toJS())
    for (const each of [graph, prepared, event, call.output]) each.dispose()
    process.exitCode = 6`)
    const told = `${signal} ${stdout}${stderr}`
    t.is(status, 6, told)
    const [codes, message = ''] = stdout.split('\n').filter((line) => /^\[|Assert/.test(line))
    t.deepEqual(JSON.parse(codes ?? '[]'), ['no error', ...Array.from({ length: 19 }, () => 'ERR_CUDA_LOST')], told)
    t.regex(message, /cudaErrorAssert \(device-side assert triggered\)/)
    t.regex(message, /context of this process is lost.*start another/)
    t.regex(stdout, /^2\.5 3$/m, told)
    t.regex(stdout, /atexit ran/)
  },
)

for (const [ending, body, code] of [
  ['natural end', '', 0],
  ['process.exit(7)', 'process.exit(7)', 7],
  ['an uncaught error', `await Stream.own(device).synchronize()`, 1],
] as const) {
  faultTest(`after a failed kernel, ${ending} has the right code, flushed output and no crash`, (t) => {
    t.timeout(300_000)
    const { status, signal, stdout, stderr } = run(`
      fault()
      await attempt(() => Stream.own(device).synchronize())
      globalThis.kept = [call, stream, event, prepared, graph]
      ${body}`)
    t.is(status, code, `${signal} ${stdout}${stderr}`)
    t.regex(stdout, /atexit ran/)
    if (code === 1) t.regex(stderr, /ERR_CUDA_LOST/)
  })
}
