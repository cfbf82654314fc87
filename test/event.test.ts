import test from 'ava'
import { devices, EpmoeError, Event, Graph, postReorder, Stream } from 'epmoe'
import { overtakable, read, validCall, validResult } from './helpers/call.js'
import { gpu, standIn } from './helpers/devices.js'
import { evaluate, torch, torchGpu, valueOf } from './helpers/python.js'

test('the CPU has no events, and says so; nor has a GPU that is not there', (t) => {
  t.is(t.throws(() => Event.create('cpu'), { instanceOf: EpmoeError })?.code, 'ERR_DEVICE')
  const error = t.throws(() => Event.create(`cuda:${devices().length + 5}`), { instanceOf: EpmoeError })
  t.true(['ERR_NO_CUDA', 'ERR_DEVICE'].includes(error?.code ?? ''), error?.message)
})

if (gpu !== undefined) {
  const device = gpu

  test('an event is done when the work before it is, and waiting lets the event loop go on', async (t) => {
    using stream = Stream.create(device)
    const call = validCall(device)
    using begin = Event.create(device).record(stream)
    postReorder({ ...call, stream })
    using end = Event.create(device).record(stream)
    if (standIn) t.false(end.done)
    let ticked = false
    setImmediate(() => {
      ticked = true
    })
    await end.synchronize()
    t.true(ticked)
    t.true(begin.done)
    t.true(end.done)
    t.true(begin.elapsedMs(end) >= 0)
    t.deepEqual(read(call.output), validResult())
    end.synchronizeSync()
  })

  test('a stream waits for an event of another, and does not without it', (t) => {
    using first = Stream.create(device)
    using second = Stream.create(device)
    using event = Event.create(device, { timing: false })
    const { zeros, slow } = overtakable(device)
    using output = zeros()
    // Nothing but the event orders the streams: one works, the other has nothing to do but wait.
    const round = (between: () => void) => {
      slow(output, first)
      event.record(first)
      between()
      second.synchronizeSync()
      const { done } = event
      first.synchronizeSync()
      return done
    }
    const rounds = [1, 2, 3, 4, 5]
    for (const _ of rounds) t.true(round(() => second.wait(event)))
    t.true(
      rounds.some(() => !round(() => {})),
      'the control must fail',
    )
  })

  test('mistakes with events are named', (t) => {
    using stream = Stream.create(device)
    const event = Event.create(device)
    using untimed = Event.create(device, { timing: false }).record(stream)
    const code = (body: () => unknown) => t.throws(body, { instanceOf: EpmoeError })?.code
    t.is(
      code(() => event.done),
      'ERR_VALUE',
    )
    t.is(
      code(() => stream.wait(event)),
      'ERR_VALUE',
    )
    t.is(
      code(() => stream.wait({} as never)),
      'ERR_VALUE',
    )
    t.is(
      code(() => event.record('cuda' as never)),
      'ERR_DEVICE',
    )
    event.record(stream)
    stream.synchronizeSync()
    t.is(
      code(() => event.elapsedMs(untimed)),
      'ERR_VALUE',
    )
    t.is(
      code(() => event.elapsedMs(5 as never)),
      'ERR_VALUE',
    )
    using graph = Graph.capture(stream, () => {
      t.is(
        code(() => event.record(stream)),
        'ERR_CAPTURE',
      )
      t.is(
        code(() => stream.wait(untimed)),
        'ERR_CAPTURE',
      )
      t.is(
        code(() => event.synchronizeSync()),
        'ERR_CAPTURE',
      )
    })
    graph.replay()
    event.dispose()
    event.dispose()
    t.is(
      code(() => event.record(stream)),
      'ERR_DISPOSED',
    )
    t.is(
      code(() => stream.wait(event)),
      'ERR_DISPOSED',
    )
  })

  test('an event and its stream may go while they are waited for', async (t) => {
    const stream = Stream.create(device)
    const event = Event.create(device).record(stream)
    const waits = [event.synchronize(), stream.synchronize()]
    event.dispose()
    stream.dispose()
    await Promise.all(waits)
    t.pass()
  })
}

const torchTest = torchGpu === undefined ? test.skip : test

for (const [direction, ordered] of [
  ['epmoe waits for torch', true],
  ['torch waits for epmoe', false],
] as const) {
  torchTest(`${direction} by an event, and not without it`, (t) => {
    const device = torchGpu ?? 'cuda:0'
    const side = Stream.create(device)
    const call = validCall(device)
    const expected = validResult()
    const run = (between: (first: Stream, second: Stream) => void): unknown => {
      // torch's tensors are handed over as they are, and each side works on a stream of its own.
      const rows = call.downOutput.toTorch()
      const input = evaluate('torch.zeros_like(x)', { x: rows })
      const output = evaluate('torch.zeros(3, 8, device="cuda")')
      torch.get('cuda').method('synchronize').dispose()
      const torchStream = Stream.torchCurrent(device)
      const { downOutput: _rows, output: _output, ...rest } = call
      const work = () => postReorder({ ...rest, downOutput: input, output, stream: side })
      if (ordered) {
        evaluate('(torch.cuda._sleep(100_000_000), i.copy_(x))', { i: input, x: rows }).dispose()
        between(torchStream, side)
        work()
        side.synchronizeSync()
        const seen = valueOf('x.flatten().tolist()', { x: output })
        torch.get('cuda').method('synchronize').dispose()
        return seen
      }
      // epmoe's stream is made slow by torch, which then goes on elsewhere.
      evaluate('(i.copy_(x), torch.cuda.synchronize())', { i: input, x: rows }).dispose()
      evaluate('[s.__enter__(), torch.cuda._sleep(100_000_000), s.__exit__(None, None, None)]', {
        s: evaluate('torch.cuda.stream(torch.cuda.ExternalStream(a))', { a: side.address }),
      }).dispose()
      work()
      between(side, torchStream)
      const seen = valueOf('x.clone().flatten().tolist()', { x: output })
      side.synchronizeSync()
      return seen
    }
    using event = Event.create(device)
    for (const _ of [1, 2, 3]) {
      t.deepEqual(
        run((first, second) => second.wait(event.record(first))),
        expected,
      )
    }
    t.notDeepEqual(
      run(() => {}),
      expected,
      'the control must fail',
    )
    side.dispose()
  })
}
