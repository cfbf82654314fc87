// What breaks when CPython and torch live in a Node process, each in a process of its own.
import { spawnSync } from 'node:child_process'
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import test from 'ava'
import { begin, executable, hostilePath, run, temporaryFolder } from './helpers/embedded.js'
import { workerFile, workersRun } from './helpers/workers.js'

const dataset = `
import os, time, torch
class Squares(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.tensor(i * i)
def load(workers):
    loader = torch.utils.data.DataLoader(Squares(), batch_size=4, num_workers=workers)
    return [batch.tolist() for batch in loader]
def wait(): time.sleep(60)
def terminated():
    import multiprocessing
    process = multiprocessing.Process(target=wait)
    process.start()
    time.sleep(1)
    process.terminate()
    process.join(20)
    return process.exitcode
`

test('a DataLoader finds its interpreter, whatever python3 is on PATH', (t) => {
  const loaded = run(
    `${begin(dataset)}
    console.log(JSON.stringify(work.method('load', 2).toJS()))`,
    { environment: { PATH: hostilePath() } },
  )
  t.deepEqual(loaded, [
    [0, 1, 4, 9],
    [16, 25, 36, 49],
  ])
})

test('a Node child is heard of while and after a DataLoader runs on its executor', (t) => {
  const result = run(`${begin(dataset)}
    const { spawn } = await import('node:child_process')
    const child = spawn('sleep', ['1'])
    const ended = new Promise((resolve) => child.on('exit', (code) => resolve(code)))
    const loaded = await work.methodAsync('load', 2)
    const code = await Promise.race([ended, new Promise((resolve) => setTimeout(() => resolve('never'), 20000).unref())])
    console.log(JSON.stringify([loaded.length, code]))`)
  t.deepEqual(result, [2, 0])
})

test('a process that Python terminates ends by it, and Node’s own SIGTERM handler is not called', (t) => {
  const result = run(`${begin(dataset)}
    let called = 0
    process.on('SIGTERM', () => called++)
    const code = (await work.methodAsync('terminated')).toJS()
    console.log(JSON.stringify([code, called]))`)
  t.deepEqual(result, [-15, 0])
})

test('an environment is used as its interpreter uses it: prefix, packages and .pth files', (t) => {
  const where = temporaryFolder()
  const venv = join(where, 'venv')
  const made = spawnSync(executable, ['-m', 'venv', '--without-pip', venv], { encoding: 'utf8' })
  t.is(made.status, 0, made.stderr)
  const library = readdirSync(join(venv, 'lib'))[0] ?? ''
  const site = join(venv, 'lib', library, 'site-packages')
  mkdirSync(join(where, 'beside'))
  writeFileSync(join(where, 'beside', 'found_by_pth.py'), 'value = 7')
  writeFileSync(join(site, 'more.pth'), `${join(where, 'beside')}\n`)
  const result = run(
    `const python = startPython()
    console.log(JSON.stringify([python.import('sys').get('prefix').toJS(), python.import('found_by_pth').get('value').toJS()]))`,
    { environment: { EPMOE_PYTHON: join(venv, 'bin', 'python') } },
  )
  t.deepEqual(result, [venv, 7])
})

const withWorkers = workersRun ? test : test.skip

withWorkers('a worker that asks for Python first is refused, and the main thread gets it afterwards', (t) => {
  const result = run(`
    const { Worker } = await import('node:worker_threads')
    const worker = new Worker(${JSON.stringify(workerFile)}, { workerData: { mode: 'python' }, execArgv: [] })
    const refusal = await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject))
    console.log(JSON.stringify([refusal.code, startPython().eval('1 + 1').toJS()]))`)
  t.deepEqual(result, ['ERR_PYTHON_START', 2])
})

test('collecting garbage all the time harms no call that is under way', (t) => {
  const result = run(
    `const python = startPython()
    const slow = python.eval('lambda *a: (__import__("time").sleep(0.001), sum(a))[1]')
    let sum = 0
    for (let round = 0; round < 60; round++) {
      const jobs = [1, 2, 3].map((i) => python.eval('lambda f: f').call(slow).callAsync(i, round, { a: null }.a ?? 0))
      globalThis.gc()
      for (const job of jobs) { sum += Number((await job).toJS()); globalThis.gc() }
    }
    console.log(JSON.stringify(sum))`,
    { flags: ['--expose-gc'] },
  )
  t.is(result, 60 * 6 + 3 * 1770)
})

test('what Python prints arrives, however it is buffered, and before the process ends', (t) => {
  const program = `import { startPython } from 'epmoe'; startPython().exec('print("from Python", end="")'); console.log(' and Node')`
  const args = ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program]
  const { stdout } = spawnSync(process.execPath, args, {
    encoding: 'utf8',
    env: { ...process.env, EPMOE_PYTHON: executable },
  })
  t.regex(stdout, /from Python/)
})
