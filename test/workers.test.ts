import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import test from 'ava'
import type { Device } from 'epmoe'
import { read, runPostReorder, validCall, validResult } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'
import { valueOf } from './helpers/python.js'
import { workerFile, workersRun } from './helpers/workers.js'

const inTurn = workersRun ? test.serial : test.serial.skip

function start(workerData: object): Worker {
  return new Worker(workerFile, { workerData, execArgv: [] })
}

/** The last message, once the worker has ended by itself. */
async function resultOf(worker: Worker): Promise<unknown> {
  let last: unknown
  worker.on('message', (message) => {
    last = message
  })
  const [code] = (await once(worker, 'exit')) as [number]
  if (code !== 0) throw new Error(`worker ended with ${code}`)
  return last
}

function mainIsWell(device: Device): boolean {
  const call = validCall(device)
  runPostReorder(call, device)
  return JSON.stringify(read(call.output)) === JSON.stringify(validResult())
}

for (const device of testDevices)
  inTurn(
    `kernels run in workers and in the main thread at the same time, each on its own tensors, on ${device}`,
    async (t) => {
      const workers = [1, 2, 3].map((seed) => start({ mode: 'kernels', calls: 300, seed, device }))
      const results = Promise.all(workers.map(resultOf))
      let running = true
      void results.finally(() => {
        running = false
      })
      let calls = 0
      while (running) {
        for (let i = 0; i < 20; i++, calls++) t.true(mainIsWell(device))
        await sleep(0)
      }
      t.deepEqual(
        await results,
        [1, 2, 3].map(() => ({ calls: 300, live: 0 })),
      )
      t.true(calls > 20)
    },
  )

inTurn('Python is refused in a worker, with the reason, and the main thread keeps it', async (t) => {
  t.is(valueOf('1 + 1'), 2)
  const result = (await resultOf(start({ mode: 'python' }))) as { code: string; message: string }
  t.is(result.code, 'ERR_PYTHON_START')
  t.regex(result.message, /main thread/)
  t.is(valueOf('torch.ones(3).sum().item()'), 3)
})

for (const device of testDevices)
  inTurn(`a worker that is terminated in the middle of calls harms nobody, on ${device}`, async (t) => {
    for (let round = 0; round < 15; round++) {
      const worker = start({ mode: 'kernels', calls: 1e9, seed: round + 1, device })
      await once(worker, 'message')
      await sleep(round % 5)
      await worker.terminate()
      t.true(mainIsWell(device))
    }
    t.is(valueOf('torch.ones(2).sum().item()'), 2)
  })

inTurn('a process whose workers alone use the kernels outlives them', (t) => {
  // Node unloads what no thread holds any more: the library's own threads must not be left without their code.
  const program = `
    import { once } from 'node:events'
    import { Worker } from 'node:worker_threads'
    for (let round = 0; round < 60; round++) {
      const workerData = { mode: 'kernels', calls: 1e9, seed: round + 1 }
      const worker = new Worker(${JSON.stringify(workerFile)}, { workerData, execArgv: [] })
      await once(worker, 'message')
      await worker.terminate()
    }
    const { readFileSync } = await import('node:fs')
    console.log(/libepmoe/.test(readFileSync('/proc/self/maps', 'utf8')))`
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '--eval', program], {
    encoding: 'utf8',
    env: { ...process.env, NODE_OPTIONS: '' },
  })
  t.is(signal, null, stderr)
  t.is(status, 0, stderr)
  if (process.platform === 'linux') t.is(stdout, 'true\n')
})
