import test from 'ava'
import { devices, EpmoeError, type PyRef, postReorder, Stream, Tensor } from 'epmoe'
import { on, read, validCall, validResult } from './helpers/call.js'
import { gpu } from './helpers/devices.js'
import { evaluate, torch, valueOf } from './helpers/python.js'

test('the CPU has no streams, and says so', (t) => {
  for (const make of [() => Stream.create('cpu'), () => Stream.own('cpu'), () => Stream.torchCurrent('cpu')]) {
    t.is(t.throws(make, { instanceOf: EpmoeError })?.code, 'ERR_DEVICE')
  }
})

test('a GPU that is not there is named', (t) => {
  const absent = `cuda:${devices().length + 5}` as const
  const error = t.throws(() => Stream.create(absent), { instanceOf: EpmoeError })
  t.true(['ERR_NO_CUDA', 'ERR_DEVICE'].includes(error?.code ?? ''), error?.message)
})

if (gpu !== undefined) {
  const device = gpu

  test('an op runs on the stream it is given, and waiting lets the event loop go on', async (t) => {
    using stream = Stream.create(device)
    const call = validCall(device)
    postReorder({ ...call, stream })
    let ticked = false
    setImmediate(() => {
      ticked = true
    })
    await stream.synchronize()
    t.true(ticked)
    t.deepEqual(read(call.output), validResult())
  })

  test('work on one tensor keeps its order across streams', async (t) => {
    using first = Stream.create(device)
    using second = Stream.create(device)
    // Large enough that the second call would start before the first ends, were it not made to wait.
    const [T, K, H] = [4096, 8, 7168]
    using rows = Tensor.fromTorch(evaluate(`torch.ones(${T * K}, ${H}, dtype=torch.bfloat16, device="cuda")`))
    using src2dst = Tensor.fromTorch(evaluate(`torch.arange(${T * K}, device="cuda")`))
    using weights = Tensor.fromTorch(evaluate(`torch.full((${T}, ${K}), 0.5, device="cuda")`))
    using middle = Tensor.zeros([T, H], { dtype: 'bfloat16', device })
    using last = Tensor.zeros([T, H], { dtype: 'bfloat16', device })
    using one = Tensor.fromTorch(evaluate(`torch.arange(${T}, device="cuda")`))
    using unit = Tensor.fromTorch(evaluate(`torch.ones(${T}, 1, device="cuda")`))
    for (let round = 0; round < 5; round++) {
      middle.copyFrom(Tensor.zeros([T, H], { dtype: 'bfloat16', device }))
      postReorder({ downOutput: rows, output: middle, src2dst, topkWeights: weights, stream: first })
      postReorder({ downOutput: middle, output: last, src2dst: one, topkWeights: unit, stream: second })
      const seen = last.toTorch() as PyRef
      t.is(valueOf('x.float().min().item()', { x: seen }), 4)
      seen.dispose()
    }
    await second.synchronize()
  })

  test('torch on a side stream is followed', (t) => {
    const side = torch.get('cuda').method('Stream')
    const call = validCall(device)
    const output = evaluate(`torch.full((3, 8), float("nan"), device="cuda")`)
    const context = torch.get('cuda').method('stream', side)
    context.method('__enter__').dispose()
    try {
      t.is(Stream.torchCurrent(device).address, side.get('cuda_stream').toJS() as number)
      postReorder({ ...call, output })
    } finally {
      context.method('__exit__', null, null, null).dispose()
    }
    side.method('synchronize').dispose()
    t.deepEqual(valueOf('x.flatten().tolist()', { x: output }), validResult())
  })

  test('an index out of range rejects the wait, once', async (t) => {
    using stream = Stream.create(device)
    postReorder({ ...validCall(device), src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, 17]), [6]), stream })
    const error = await t.throwsAsync(stream.synchronize(), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_INDEX_OUT_OF_RANGE')
    t.is(error?.argument, 'src2dst')
    t.is(error?.received, '17 at token 2, slot 1')
    await stream.synchronize()
  })

  test('a disposed stream is an error, and disposing waits for its work', (t) => {
    const stream = Stream.create(device)
    const call = validCall(device)
    postReorder({ ...call, stream })
    stream.dispose()
    stream.dispose()
    t.deepEqual(read(call.output), validResult())
    t.is(t.throws(() => postReorder({ ...call, stream }), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
  })
}
