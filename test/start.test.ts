import { spawnSync } from 'node:child_process'
import test from 'ava'
import { workersRun } from './helpers/workers.js'

/** Runs TypeScript in a process of its own; the public API is imported as `e`. */
function run(source: string, environment: Record<string, string> = {}) {
  const program = `import * as e from 'epmoe'\n${source}`
  const result = spawnSync(
    process.execPath,
    ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program],
    { encoding: 'utf8', env: { ...process.env, ...environment } },
  )
  return { ...result, output: result.stdout + result.stderr }
}

test('importing epmoe and running an op starts no Python', (t) => {
  const { status, output } = run(`
    const z = (shape, dtype = 'float32') => e.Tensor.zeros(shape, { dtype })
    e.postReorder({ downOutput: z([2, 8]), output: z([1, 8]), src2dst: z([2], 'int32'), topkWeights: z([1, 2]) })
    const maps = (await import('node:fs')).readFileSync('/proc/self/maps', 'utf8')
    console.log(/libpython|pymport/.test(maps) ? 'python' : 'none')`)
  t.is(status, 0, output)
  t.regex(output, /^none$/m)
})

test('an interpreter that does not exist is named', (t) => {
  const { output } = run(
    `try { e.startPython({ python: '/no/such/python' }) } catch (x) { console.log(x.code, x.message) }`,
  )
  t.regex(output, /ERR_PYTHON_START .*\/no\/such\/python \(from option\)/)
})

test('EPMOE_PYTHON is used, and told when it does not run', (t) => {
  const { output } = run(`try { e.startPython() } catch (x) { console.log(x.code, x.message) }`, {
    EPMOE_PYTHON: '/bin/false',
  })
  t.regex(output, /ERR_PYTHON_START .*\/bin\/false \(from EPMOE_PYTHON\)/)
})

const withWorkers = workersRun ? test : test.skip
withWorkers('a worker may use the kernels but not start Python', (t) => {
  const { status, output } = run(`
    const { Worker } = await import('node:worker_threads')
    const source = "import('epmoe').then((e) => { try { e.startPython() } catch (x) { console.log(x.code) } console.log(String(e.Tensor.zeros([2]))) })"
    const worker = new Worker(source, { eval: true, execArgv: [] })
    await new Promise((resolve) => worker.on('exit', resolve))`)
  t.is(status, 0, output)
  t.regex(output, /ERR_PYTHON_START/)
  t.regex(output, /Tensor\(float32\[2\] on cpu\)/)
})

test('a torch without the exchange table is read by __dlpack__', (t) => {
  const { status, output } = run(
    `
    const py = e.startPython()
    const torch = py.import('torch')
    const v = (x, n) => py.eval(x, { torch, ...n })
    const [d, o, s, w] = ['torch.randn(8, 16)', 'torch.full((4, 16), float("nan"))', 'torch.randperm(8)', 'torch.rand(4, 2)'].map((x) => v(x))
    e.postReorder({ downOutput: d, output: o, src2dst: s, topkWeights: w })
    const error = v('((d[s].view(4, 2, -1) * w[..., None]).sum(1) - o).abs().max().item()', { d, s, w, o }).toJS()
    const tensor = e.Tensor.fromTorch(d)
    const back = tensor.toTorch()
    console.log(error < 1e-5, back.method('data_ptr').toJS() === d.method('data_ptr').toJS(), e.stats().cpu.tensors)
    for (const bad of ['torch.ones(8, 16).to_sparse()', 'torch.ones(8, 16, requires_grad=True)', '3'])
      try { e.postReorder({ downOutput: v(bad), output: o, src2dst: s, topkWeights: w }) } catch (x) { console.log(x.code) }`,
    { EPMOE_EXCHANGE: '0' },
  )
  t.is(status, 0, output)
  // One tensor is left, the one that was asked for: those made for the call are gone.
  t.regex(output, /^true true 1\nERR_UNSUPPORTED_TENSOR\nERR_UNSUPPORTED_TENSOR\nERR_NOT_A_TENSOR$/m)
})

test('a process that used torch ends by itself, with code 0', (t) => {
  const { status, signal, output } = run(`
    const py = e.startPython()
    const x = py.import('torch').method('ones', 4)
    const kept = e.Tensor.fromTorch(x)
    const own = e.Tensor.zeros([4]).toTorch()
    console.log('done', kept.numel, String(own))`)
  t.is(signal, null)
  t.is(status, 0, output)
  t.regex(output, /done 4/)
})

test('process.exit keeps its code with Python loaded', (t) => {
  t.is(run(`e.startPython().import('torch'); process.exit(7)`).status, 7)
})
