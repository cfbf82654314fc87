// torch.compile inside Node: what it finds, what it starts and what it leaves behind.
import { spawnSync } from 'node:child_process'
import test from 'ava'
import { begin, executable, hostilePath, run, temporaryFolder } from './helpers/embedded.js'

const compilation = `
import glob, os, torch
def gated(x, y): return (torch.nn.functional.silu(x) * y).sum(-1)
def ungated(x, y): return (x * y).sum(-1)
def differences(seed):
    x, y = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(seed)).unbind()
    made = torch.compile(gated, fullgraph=True, dynamic=False)(x, y)
    return [float((made - eager(x, y)).abs().max()) for eager in (gated, ungated)]
def compile_worker():
    from torch._inductor.async_compile import AsyncCompile
    return AsyncCompile.process_pool().submit(eval, "__import__('sys').executable").result(60)
def libraries():
    return len(glob.glob(os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/**/*.so", recursive=True))
`

/** What torch.compile would call for the CPU. */
const compiler = process.env['CXX'] ?? 'g++'

test('torch.compile calls the C++ compiler on either thread, and what it leaves running holds up no exit', (t) => {
  if (spawnSync(compiler, ['--version']).status !== 0) {
    t.log(`not run: there is no C++ compiler (${compiler})`)
    t.pass()
    return
  }
  // Two compile threads: with one, torch has no process of its interpreter for them, as it has for Triton's kernels.
  const environment = { PATH: hostilePath(), TORCHINDUCTOR_COMPILE_THREADS: '2', CUDA_VISIBLE_DEVICES: '' }
  const program = (rest: string) => `${begin(compilation)}
    const { spawn } = await import('node:child_process')
    const child = spawn('sleep', ['1'])
    const ended = new Promise((resolve) => child.on('exit', resolve))
    ${rest}`
  const [onExecutor, onMain, libraries, code, worker] = run(
    program(`
      const onExecutor = (await work.methodAsync('differences', 1)).toJS()
      python.eval('__import__("torch")._dynamo.reset()')
      const onMain = work.method('differences', 2).toJS()
      const worker = (await work.methodAsync('compile_worker')).toJS()
      const code = await Promise.race([ended, new Promise((resolve) => setTimeout(() => resolve('never'), 20000).unref())])
      console.log(JSON.stringify([onExecutor, onMain, work.method('libraries').toJS(), code, worker]))
      process.exitCode = 7`),
    { environment: { ...environment, TORCHINDUCTOR_CACHE_DIR: temporaryFolder() }, code: 7 },
  ) as [[number, number], [number, number], number, unknown, string]
  for (const [same, other] of [onExecutor, onMain]) {
    t.true(same < 1e-4, `${same} from eager torch`)
    t.true(other > 1, `${other} from another function`)
  }
  t.true(libraries > 0, 'nothing was compiled')
  t.is(code, 0)
  t.is(worker, executable)
  // The control: without a compiler the very same is refused, as an error of Python's.
  const refused = run(
    program(`
      const error = await work.methodAsync('differences', 1).catch((error) => error)
      console.log(JSON.stringify([error.pythonType, error.pythonMessage, await ended]))`),
    { environment: { ...environment, TORCHINDUCTOR_CACHE_DIR: temporaryFolder(), CXX: '/nowhere/c++' } },
  ) as [string, string, number]
  t.regex(refused[0], /CompilerError|InductorError|BackendCompilerFailed/)
  t.regex(refused[1], /nowhere/)
  t.is(refused[2], 0)
})
