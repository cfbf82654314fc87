import test from 'ava'
import { EpmoeError, postReorder, preprocess, Stream, scope, stats, Tensor } from 'epmoe'
import { on, read, validCall, validResult } from './helpers/call.js'
import { gpu, testDevices } from './helpers/devices.js'
import { evaluate, valueOf } from './helpers/python.js'

const settle = (device: string) => {
  if (device !== 'cpu') Stream.own(device as 'cuda:0').synchronizeSync()
}

for (const device of testDevices) {
  test(`a prepared call gives what the call gives, on what its tensors hold by then, on ${device}`, (t) => {
    const call = validCall(device)
    using prepared = postReorder.prepare(call)
    prepared.run()
    t.deepEqual(read(call.output), validResult())
    call.topkWeights.copyFrom(on(device, new Float32Array(6).fill(0), [3, 2]))
    prepared.run()
    t.deepEqual(read(call.output), new Array(24).fill(0))
    // Another call in between does not disturb it.
    const other = validCall(device)
    postReorder(other)
    call.topkWeights.copyFrom(other.topkWeights)
    prepared.run()
    t.deepEqual(read(call.output), validResult())
  })

  test(`mistakes are found when a call is prepared, as when it is made, on ${device}`, (t) => {
    const call = validCall(device)
    for (const mistaken of [
      { ...call, output: on(device, new Float32Array(27), [3, 9]) },
      { ...call, src2dst: undefined as never },
      { ...call, startExpertId: 5 },
      { ...call, numerics: 'exact' as never },
      { ...call, surplus: 1 },
      { ...call, stream: 5 as never },
    ]) {
      const made = t.throws(() => postReorder(mistaken), { instanceOf: EpmoeError })
      const prepared = t.throws(() => postReorder.prepare(mistaken), { instanceOf: EpmoeError })
      t.deepEqual([prepared?.code, prepared?.message], [made?.code, made?.message])
    }
    // And an ordinary call after a failed preparation is one.
    postReorder(call)
    t.deepEqual(read(call.output), validResult())
  })

  test(`an index out of range is reported at each run, on ${device}`, (t) => {
    const call = { ...validCall(device), src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, 17]), [6]) }
    using prepared = postReorder.prepare(call)
    for (let round = 0; round < 2; round++) {
      const error = t.throws(
        () => {
          prepared.run()
          settle(device)
        },
        { instanceOf: EpmoeError },
      )
      t.is(error?.code, 'ERR_INDEX_OUT_OF_RANGE')
      t.is(error?.received, '17 at token 2, slot 1')
    }
  })

  test(`a call ends with its tensors, and with itself, on ${device}`, (t) => {
    const call = validCall(device)
    const prepared = postReorder.prepare(call)
    call.src2dst.dispose()
    t.is(t.throws(() => prepared.run(), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
    prepared.dispose()
    prepared.dispose()
    t.is(t.throws(() => prepared.run(), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
    t.regex(String(prepared), /disposed/)
    const kept = scope(() => postReorder.prepare(validCall(device)))
    t.is(t.throws(() => kept.run(), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
    kept.dispose()
  })
}

test('torch tensors are held for as long as the call is', (t) => {
  const before = stats().cpu.tensors
  const ids = evaluate('torch.tensor([[1, 0], [1, 1]])')
  const rows = evaluate('torch.empty(4, dtype=torch.int32)')
  const segments = evaluate('torch.empty(3, dtype=torch.int64)')
  const prepared = preprocess.prepare({ topkIds: ids, src2dst: rows, segIndptr: segments })
  t.is(stats().cpu.tensors, before + 3)
  prepared.run()
  t.deepEqual(valueOf('x.tolist()', { x: rows }), [1, 0, 2, 3])
  valueOf('x.copy_(torch.tensor([[0, 0], [0, 1]])).tolist()', { x: ids })
  prepared.run()
  t.deepEqual(valueOf('x.tolist()', { x: rows }), [0, 1, 2, 3])
  ids.dispose()
  prepared.run()
  prepared.dispose()
  t.is(stats().cpu.tensors, before)
})

test('nothing to do is done at once', (t) => {
  using prepared = postReorder.prepare({
    downOutput: Tensor.zeros([0, 8]),
    output: Tensor.zeros([0, 8]),
    src2dst: Tensor.zeros([0], { dtype: 'int32' }),
    topkWeights: Tensor.zeros([0, 2]),
  })
  prepared.run()
  t.pass()
})

if (gpu !== undefined) {
  const device = gpu
  test('a prepared call runs on the stream it was prepared for', async (t) => {
    using stream = Stream.create(device)
    const call = validCall(device)
    using prepared = postReorder.prepare({ ...call, stream })
    prepared.run()
    await stream.synchronize()
    t.deepEqual(read(call.output), validResult())
  })
}
