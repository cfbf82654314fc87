// Several GPUs of one host.
import { spawnSync } from 'node:child_process'
import { chmodSync, mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { type Device, EpmoeError, Event, Graph, postReorder, Stream, stats, Tensor } from 'epmoe'
import { on, overtakable, read, validCall, validResult } from './helpers/call.js'
import { gpu, secondGpu, standIn } from './helpers/devices.js'

const first: Device = gpu ?? 'cuda:0'
const second: Device = secondGpu ?? 'cuda:1'
const two = secondGpu === undefined ? test.skip : test
const twoSerial = secondGpu === undefined ? test.serial.skip : test.serial
if (secondGpu === undefined) {
  test('two GPUs are needed for the other tests of this file', (t) => {
    t.log('skipped: this machine has fewer; test/stand-in.test.ts runs them on two that a stand-in plays')
    t.pass()
  })
}

const wrong = (device: Device) => ({
  ...validCall(device),
  src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, 17]), [6]),
})

two('ops run on the GPU of their tensors, whichever was used before', (t) => {
  const calls = [first, second, first, second].map((device) => validCall(device))
  for (const call of calls) postReorder(call)
  for (const call of calls) t.deepEqual(read(call.output), validResult())
  const prepared = calls.map((call) => postReorder.prepare(call))
  for (const each of prepared) each.run()
  for (const call of calls) t.deepEqual(read(call.output), validResult())
})

two('tensors of two GPUs in one call are refused by name, and nothing is written', (t) => {
  const [here, there] = [validCall(first), validCall(second)]
  for (const name of ['output', 'src2dst', 'topkIds', 'topkWeights'] as const) {
    const error = t.throws(() => postReorder({ ...here, [name]: there[name] }), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_DEVICE')
    t.is(error?.argument, name)
    t.is(error?.expected, `${first} (as downOutput)`)
    t.is(error?.received, second)
  }
  t.true(read(here.output).every(Number.isNaN))
  // And what was refused has spoilt nothing.
  postReorder(here)
  postReorder(there)
  t.deepEqual([read(here.output), read(there.output)], [validResult(), validResult()])
})

two('a stream or event of another GPU is refused by name', (t) => {
  using stream = Stream.create(second)
  using event = Event.create(first)
  const call = validCall(first)
  using graph = Graph.capture(Stream.create(first), () => postReorder(call))
  for (const mistake of [
    () => postReorder({ ...call, stream }),
    () => postReorder.prepare({ ...call, stream }).run(),
    () => event.record(stream),
    () => graph.replay(stream),
  ]) {
    const error = t.throws(mistake, { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_DEVICE', error?.message)
    t.is(error?.argument, 'stream')
    t.regex(error?.received ?? '', new RegExp(`one of ${second}`))
  }
  const within = t.throws(() => Graph.capture(stream, () => postReorder(call)), { instanceOf: EpmoeError })
  t.is(within?.code, 'ERR_CAPTURE')
})

// Serial: whoever waits for that GPU first hears of the index.
twoSerial('an index out of range is told by its own GPU alone', async (t) => {
  postReorder(wrong(second))
  await Stream.own(first).synchronize()
  const error = await t.throwsAsync(Stream.own(second).synchronize(), { instanceOf: EpmoeError })
  t.is(error?.code, 'ERR_INDEX_OUT_OF_RANGE')
  await Stream.own(second).synchronize()
})

two('copies between GPUs keep their place in the work of both', (t) => {
  const { zeros, slow, least } = overtakable(first)
  const there = overtakable(second)
  using stream = Stream.create(first)
  using other = Stream.create(second)
  const [source, target, last] = [zeros(), there.zeros(), there.zeros()] as const
  for (let round = 0; round < 5; round++) {
    slow(source, stream)
    target.copyFrom(source)
    there.move(target, last, other)
    t.is(there.least(last), 4)
    // And back: the next round must not write what this copy still reads.
    source.copyFrom(target)
    t.is(least(source), 4)
    for (const each of [target, last]) each.copyFrom(there.zeros())
    source.copyFrom(zeros())
  }
  const copied = on(first, new Float32Array([1, 2, 3]), [3]).to(second)
  t.is(copied.device, second)
  t.deepEqual(read(copied), [1, 2, 3])
})

two('a stream waits for an event of another GPU', (t) => {
  const there = overtakable(second)
  using stream = Stream.create(second)
  using event = Event.create(second, { timing: false })
  const output = there.zeros()
  there.slow(output, stream)
  using waiting = Stream.create(first)
  waiting.wait(event.record(stream))
  waiting.synchronizeSync()
  t.true(event.done)
})

two('graphs live on their own GPU, and streams are counted by device', (t) => {
  const [here, there] = [validCall(first), validCall(second)]
  using graphs = {
    here: Graph.capture(Stream.create(first), () => postReorder(here)),
    there: Graph.capture(Stream.create(second), () => postReorder(there)),
    [Symbol.dispose]() {
      this.here.dispose()
      this.there.dispose()
    },
  }
  graphs.there.replay()
  graphs.here.replay()
  t.deepEqual([read(here.output), read(there.output)], [validResult(), validResult()])
  const live = stats()
  t.true((live.devices[first]?.tensors ?? 0) >= 5)
  t.true((live.devices[second]?.tensors ?? 0) >= 5)
  t.is(live.cuda.bytes, (live.devices[first]?.bytes ?? 0) + (live.devices[second]?.bytes ?? 0))
  t.is(Stream.own(second).device, second)
  using empty = Tensor.empty([0], { device: second })
  t.is(empty.device, second)
})

const doctor = (environment: Record<string, string>) => {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const bin = mkdtempSync(join(tmpdir(), 'epmoe-smi-'))
  writeFileSync(join(bin, 'nvidia-smi'), '#!/bin/sh\necho "Stand-in, 1 MiB, 450.80"\n')
  chmodSync(join(bin, 'nvidia-smi'), 0o755)
  const program = `import { examineNative } from './src/doctor/native.ts'
    console.log(JSON.stringify((await examineNative()).findings))`
  const args = ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program]
  const env = { ...process.env, PATH: `${bin}:${process.env['PATH'] ?? ''}`, ...environment }
  const { stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8', env })
  if (stdout === '') throw new Error(stderr)
  return JSON.parse(stdout) as { name: string; state: string; value: string; remedy?: string }[]
}

const standInTest = standIn ? test : test.skip

standInTest('doctor tells of GPUs that cannot reach each other', (t) => {
  const finding = doctor({}).find(({ name }) => name === 'peer access')
  t.is(finding?.state, 'warn')
  t.is(finding?.value, 'none from GPU 0 to 1, 1 to 0')
  t.regex(finding?.remedy ?? '', /nvidia-smi topo/)
  t.is(doctor({ STAND_IN: 'peers' }).find(({ name }) => name === 'peer access')?.state, 'ok')
})

standInTest('doctor tells of a driver that is older than the toolkit', (t) => {
  const finding = doctor({ STAND_IN: 'old-driver' }).find(({ name }) => name === 'GPUs')
  t.is(finding?.state, 'warn')
  t.regex(finding?.value ?? '', /not usable by epmoe: cudaErrorInsufficientDriver/)
  t.regex(finding?.remedy ?? '', /update the driver/)
})
