import test from 'ava'
import { devices, EpmoeError, postReorder, Stream } from 'epmoe'
import { on, overtakable, read, validCall, validResult } from './helpers/call.js'
import { gpu } from './helpers/devices.js'
import { evaluate, torch, torchGpu, valueOf } from './helpers/python.js'

test('the CPU has no streams, and says so', (t) => {
  for (const make of [() => Stream.create('cpu'), () => Stream.own('cpu'), () => Stream.torchCurrent('cpu')]) {
    t.is(t.throws(make, { instanceOf: EpmoeError })?.code, 'ERR_DEVICE')
  }
})

test('a GPU that is not there is named', (t) => {
  const absent = `cuda:${devices().length + 5}` as const
  for (const make of [() => Stream.create(absent), () => Stream.own(absent), () => Stream.torchCurrent(absent)]) {
    const error = t.throws(make, { instanceOf: EpmoeError })
    t.true(['ERR_NO_CUDA', 'ERR_DEVICE'].includes(error?.code ?? ''), error?.message)
  }
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

  test('work on a view is work on the tensor: reading either waits for what was launched on the other', async (t) => {
    using stream = Stream.create(device)
    const { zeros, slow, least } = overtakable(device)
    for (let round = 0; round < 5; round++) {
      using whole = zeros()
      using view = whole.view(whole.shape)
      slow(view, stream)
      t.is(least(whole), 4)
      using other = zeros()
      using part = other.view(other.shape)
      slow(other, stream)
      t.is(least(part), 4)
    }
    await stream.synchronize()
  })

  test('work on one tensor keeps its order across streams', async (t) => {
    using first = Stream.create(device)
    using second = Stream.create(device)
    const { zeros, slow, move, least } = overtakable(device)
    const [empty, middle, last] = [zeros(), zeros(), zeros()] as const
    for (let round = 0; round < 5; round++) {
      middle.copyFrom(empty)
      last.copyFrom(empty)
      slow(middle, first)
      move(middle, last, second)
      t.is(least(last), 4)
    }
    await second.synchronize()
  })
}

if (torchGpu !== undefined) {
  const device = torchGpu

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
}

if (gpu !== undefined) {
  const device = gpu

  // Serial: whoever waits for the GPU first hears of the index.
  test.serial('an index out of range rejects the wait, once', async (t) => {
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
