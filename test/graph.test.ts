import test, { type ExecutionContext } from 'ava'
import {
  EpmoeError,
  epGather,
  epScatter,
  Graph,
  geluAndMul,
  kw,
  moeSumReduce,
  type PyRef,
  postReorder,
  preprocess,
  preReorder,
  Stream,
  shuffleMulSum,
  siluAndMul,
  stats,
  Tensor,
} from 'epmoe'
import { on, overtakable, read, validCall, validResult } from './helpers/call.js'
import { gpu } from './helpers/devices.js'
import { evaluate, python, torch, torchGpu, valueOf } from './helpers/python.js'

const torchTest = torchGpu === undefined ? test.skip : test

/** Every tensor of a run through all ops, in torch's memory; the inputs are drawn by `draw`. */
class Path {
  readonly tensors: Record<string, PyRef>

  constructor(
    readonly T: number,
    readonly K: number,
    readonly E: number,
  ) {
    const [H, I, M] = [512, 256, E * 128 * Math.ceil(T / 128)]
    const make = (code: string) => evaluate(code, { T, K, E, H, I, M, R: T * K })
    const bf16 = 'dtype=torch.bfloat16, device="cuda"'
    this.tensors = {
      topkIds: make('torch.empty(T, K, dtype=torch.int64, device="cuda")'),
      input: make(`torch.empty(T, H, ${bf16})`),
      weights: make('torch.empty(T, K, device="cuda")'),
      src2dst: make('torch.empty(R, dtype=torch.int32, device="cuda")'),
      segIndptr: make('torch.empty(E + 1, dtype=torch.int64, device="cuda")'),
      reorderTopkIds: make('torch.empty(R, dtype=torch.int64, device="cuda")'),
      maskedM: make('torch.empty(E, dtype=torch.int32, device="cuda")'),
      gateupInput: make(`torch.zeros(R, H, ${bf16})`),
      quantised: make('torch.zeros(R, H, dtype=torch.float8_e4m3fn, device="cuda")'),
      quantisedScales: make('torch.zeros(R, H // 128, device="cuda")'),
      rowScales: make('torch.zeros(R, 1, device="cuda")'),
      rowQuantised: make('torch.zeros(R, H, dtype=torch.float8_e4m3fn, device="cuda")'),
      silu: make(`torch.zeros(R, I, ${bf16})`),
      gelu: make(`torch.zeros(R, I, ${bf16})`),
      output: make(`torch.zeros(T, H, ${bf16})`),
      shuffled: make(`torch.zeros(T, H, ${bf16})`),
      summed: make(`torch.zeros(T, H, ${bf16})`),
      reserved: make('torch.full((E,), M // E, dtype=torch.int32, device="cuda")'),
      startLoc: make('torch.empty(E, dtype=torch.int32, device="cuda")'),
      scattered: make(`torch.zeros(M, H, ${bf16})`),
      mIndices: make('torch.empty(M, dtype=torch.int32, device="cuda")'),
      outputIndex: make('torch.empty(T, K, dtype=torch.int32, device="cuda")'),
      gathered: make(`torch.zeros(T, H, ${bf16})`),
    }
  }

  /** New inputs in the same memory, as a serving stack feeds a captured graph. */
  draw(seed: number): void {
    python
      .eval(
        '[torch.manual_seed(seed), ids.copy_(torch.randint(-1, E, ids.shape)), x.normal_(), w.uniform_(), ' +
          '[z.zero_() for z in outputs]]',
        {
          torch,
          seed,
          E: this.E,
          ids: this.tensors['topkIds'],
          x: this.tensors['input'],
          w: this.tensors['weights'],
          outputs: Object.values(this.#outputs()),
        },
      )
      .dispose()
  }

  run(): void {
    const t = this.tensors as Record<string, PyRef> & Record<'topkIds' | 'src2dst' | 'input' | 'weights', PyRef>
    const of = (name: string) => t[name] as PyRef
    preprocess({
      topkIds: t.topkIds,
      src2dst: t.src2dst,
      segIndptr: of('segIndptr'),
      reorderTopkIds: of('reorderTopkIds'),
      maskedM: of('maskedM'),
    })
    const slots = { src2dst: t.src2dst, topkIds: t.topkIds, startExpertId: 0, endExpertId: this.E - 1 }
    preReorder({ input: t.input, gateupInput: of('gateupInput'), ...slots })
    preReorder({
      input: t.input,
      gateupInput: of('quantised'),
      ...slots,
      outputScales: of('quantisedScales'),
      quantization: 'group',
    })
    preReorder({
      input: t.input,
      gateupInput: of('rowQuantised'),
      ...slots,
      outputScales: of('rowScales'),
      quantization: 'token',
    })
    const rows = { gateupOutput: of('gateupInput'), reorderTopkIds: of('reorderTopkIds'), endExpertId: this.E - 1 }
    siluAndMul({ ...rows, downInput: of('silu') })
    geluAndMul({ ...rows, downInput: of('gelu') })
    postReorder({
      downOutput: of('gateupInput'),
      output: of('output'),
      ...slots,
      topkWeights: t.weights,
      residual: t.input,
    })
    shuffleMulSum({ input: of('gateupInput'), output: of('shuffled'), permutation: t.src2dst, factors: t.weights })
    const [T, K] = [this.T, this.K]
    using cube = of('gateupInput').method('view', T, K, 512)
    moeSumReduce({ input: cube, output: of('summed') })
    epScatter({
      recvX: t.input,
      recvTopk: t.topkIds,
      numRecvTokensPerExpert: of('reserved'),
      expertStartLoc: of('startLoc'),
      outputTensor: of('scattered'),
      mIndices: of('mIndices'),
      outputIndex: of('outputIndex'),
    })
    epGather({
      inputTensor: of('scattered'),
      recvTopkIds: t.topkIds,
      recvTopkWeight: t.weights,
      inputIndex: of('outputIndex'),
      outputTensor: of('gathered'),
    })
  }

  #outputs(): Record<string, PyRef> {
    const { topkIds: _ids, input: _input, weights: _weights, reserved: _reserved, ...outputs } = this.tensors
    return outputs
  }

  /** A checksum of the bytes of every output, by name. */
  digest(): Record<string, number> {
    const sum =
      '(x.contiguous().view(torch.uint8).long() * (torch.arange(x.nbytes, device=x.device) % 65521).view(-1)' +
      '.view(x.contiguous().view(torch.uint8).shape)).sum().item()'
    return Object.fromEntries(Object.entries(this.#outputs()).map(([name, x]) => [name, valueOf(sum, { x }) as number]))
  }
}

/** Whether a replay does to new inputs what a run does, for which it must have written every output. */
function replaysAsItRuns(t: ExecutionContext, path: Path, replay: () => void): void {
  for (const seed of [2, 3]) {
    path.draw(seed)
    const untouched = path.digest()
    replay()
    const replayed = path.digest()
    path.draw(seed)
    path.run()
    t.deepEqual(replayed, path.digest())
    for (const [name, sum] of Object.entries(replayed)) t.not(sum, untouched[name], `${name} was not written`)
  }
}

/** The code of the EpmoeError that is thrown, or whatever else is. */
function codeOf(body: () => unknown): unknown {
  try {
    body()
    return 'no error'
  } catch (error) {
    return error instanceof EpmoeError ? error.code : error
  }
}

const sizes = [
  [5, 4, 16],
  [1500, 8, 64],
] as const

for (const [T, K, E] of sizes) {
  torchTest(`every op captures into a CUDA graph from TypeScript and replays on new inputs, T = ${T}`, (t) => {
    const path = new Path(T, K, E)
    path.draw(1)
    using graph = torch.get('cuda').method('CUDAGraph')
    using context = torch.get('cuda').method('graph', graph)
    context.method('__enter__').dispose()
    try {
      path.run()
    } finally {
      context.method('__exit__', null, null, null).dispose()
    }
    replaysAsItRuns(t, path, () => graph.method('replay').dispose())
    torch.get('cuda').method('synchronize', kw({})).dispose()
  })

  torchTest(`Graph captures every op and replays on new inputs, T = ${T}`, (t) => {
    const path = new Path(T, K, E)
    path.draw(1)
    using stream = Stream.create(torchGpu)
    using graph = Graph.capture(stream, () => path.run())
    // torch draws and reads on its own stream: the replay is ordered after one and before the other.
    replaysAsItRuns(t, path, () => graph.replay())
    replaysAsItRuns(t, path, () => graph.replay(Stream.torchCurrent(torchGpu)))
  })
}

test('the CPU has no graphs, and says so', (t) => {
  for (const stream of ['cpu', undefined, { device: 'cpu', address: 0 }]) {
    const error = t.throws(() => Graph.capture(stream as never, () => t.fail()), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_VALUE')
    t.is(error?.argument, 'stream')
    t.regex(error?.hint ?? '', /CPU/)
  }
})

if (gpu !== undefined) {
  const device = gpu
  test('a graph keeps the memory of its tensors, and needs neither them nor its prepared calls', (t) => {
    using stream = Stream.create(device)
    const { output, ...inputs } = validCall(device)
    const kept = postReorder.prepare({ ...inputs, output })
    const graph = Graph.capture(stream, () => kept.run())
    t.deepEqual(read(output), new Array(24).fill(Number.NaN), 'capturing runs nothing')
    kept.dispose()
    const held = stats().cuda.bytes
    for (const each of Object.values(inputs)) if (each instanceof Tensor) each.dispose()
    t.is(stats().cuda.bytes, held)
    // What is allocated now must not be given memory of the graph's.
    const others = [1, 2, 3, 4].map(() => on(device, new Float32Array(48).fill(9), [48]))
    graph.replay()
    t.deepEqual(read(output), validResult())
    for (const other of others) other.dispose()
    graph.dispose()
    graph.dispose()
    t.true(stats().cuda.bytes < held)
    t.is(
      codeOf(() => graph.replay()),
      'ERR_DISPOSED',
    )
    t.regex(String(graph), /disposed/)
  })

  test('a replay comes after earlier work on its tensors and before later work on them, on any stream', (t) => {
    using first = Stream.create(device)
    using second = Stream.create(device)
    using third = Stream.create(device)
    const { zeros, slow, move, least } = overtakable(device)
    const [empty, before, between, after] = [zeros(), zeros(), zeros(), zeros()] as const
    using graph = Graph.capture(second, () => move(before, between))
    for (let round = 0; round < 5; round++) {
      for (const each of [before, between, after]) each.copyFrom(empty)
      slow(before, first)
      graph.replay()
      move(between, after, third)
      t.is(least(after), 4)
    }
  })

  test('copies between GPU and pinned memory are part of a graph, and so is a tensor made in its body', async (t) => {
    using stream = Stream.create(device)
    const { output, ...call } = validCall(device)
    const host = Tensor.empty([3, 8], { pinned: true })
    using graph = Graph.capture(stream, () => {
      using inner = Tensor.empty([3, 8], { device })
      postReorder({ ...call, output: inner })
      output.copyFrom(inner)
      host.copyFrom(output)
    })
    graph.replay()
    await stream.synchronize()
    t.deepEqual(Array.from(host.data as Float32Array), validResult())
  })

  // Serial: whoever waits for the GPU first hears of the index.
  test.serial('an index out of range is reported after each replay', async (t) => {
    using stream = Stream.create(device)
    const call = { ...validCall(device), src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, 17]), [6]) }
    using graph = Graph.capture(stream, () => postReorder(call))
    await stream.synchronize()
    for (let round = 0; round < 2; round++) {
      graph.replay()
      const error = await t.throwsAsync(stream.synchronize(), { instanceOf: EpmoeError })
      t.is(error?.code, 'ERR_INDEX_OUT_OF_RANGE')
      t.is(error?.received, '17 at token 2, slot 1')
    }
    call.src2dst.copyFrom(on(device, new Int32Array([5, 0, 4, 1, 3, 2]), [6]))
    graph.replay()
    await stream.synchronize()
    t.deepEqual(read(call.output), validResult())
  })

  test('what a graph cannot hold is refused by name, and the capture goes on', (t) => {
    using stream = Stream.create(device)
    using other = Stream.create(device)
    using earlier = Graph.capture(other, () => {})
    const call = validCall(device)
    const host = validCall('cpu')
    const refused: Record<string, () => unknown> = {
      'an op on the CPU': () => postReorder(host),
      'an op on another stream': () => postReorder({ ...call, stream: other }),
      'a blocking copy to the host': () => call.output.toHostSync(),
      'a copy of pageable memory': () => call.output.copyFrom(host.output),
      'a copy on the host': () => host.output.copyFrom(Tensor.zeros([3, 8])),
      'waiting for the stream': () => stream.synchronizeSync(),
      'waiting for another': () => other.synchronizeSync(),
      'a capture within it': () => Graph.capture(other, () => {}),
      'a replay': () => earlier.replay(),
    }
    const codes: Record<string, unknown> = {}
    using graph = Graph.capture(stream, () => {
      for (const [what, body] of Object.entries(refused)) codes[what] = codeOf(body)
      postReorder(call)
    })
    t.deepEqual(codes, Object.fromEntries(Object.keys(refused).map((what) => [what, 'ERR_CAPTURE'])))
    graph.replay()
    t.deepEqual(read(call.output), validResult())
    t.is(
      codeOf(() => graph.replay('cuda' as never)),
      'ERR_DEVICE',
    )
  })

  test('an error in the body ends the capture, is thrown on, and harms nothing', async (t) => {
    using stream = Stream.create(device)
    const call = validCall(device)
    const mistake = new RangeError('of the body')
    const bodies: [() => unknown, unknown][] = [
      [
        () => {
          postReorder(call)
          throw mistake
        },
        mistake,
      ],
      [() => postReorder({ ...call, startExpertId: 5 }), 'ERR_VALUE'],
      [async () => postReorder(call), 'ERR_CAPTURE'],
      [() => call.output.toHostSync(), 'ERR_CAPTURE'],
    ]
    for (const [body, expected] of bodies) {
      t.is(
        codeOf(() => Graph.capture(stream, body)),
        expected,
      )
      await stream.synchronize()
      t.deepEqual(read(call.output), new Array(24).fill(Number.NaN))
    }
    using graph = Graph.capture(stream, () => postReorder(call))
    graph.replay()
    t.deepEqual(read(call.output), validResult())
  })
}

if (torchGpu !== undefined) {
  const device = torchGpu

  test('torch’s stream is captured when it is a side stream, with torch’s work in place', (t) => {
    t.is(
      codeOf(() => Graph.capture(Stream.torchCurrent(device), () => {})),
      'ERR_CAPTURE',
      'the default stream cannot be',
    )
    const call = validCall(device)
    const output = evaluate('torch.full((3, 8), float("nan"), device="cuda")')
    using context = torch.get('cuda').method('stream', torch.get('cuda').method('Stream'))
    context.method('__enter__').dispose()
    let graph: Graph
    try {
      graph = Graph.capture(Stream.torchCurrent(device), () => {
        postReorder({ ...call, output })
        output.method('mul_', 2).dispose()
      })
    } finally {
      context.method('__exit__', null, null, null).dispose()
    }
    // Replayed beside torch's current stream, which is the default one now, and waits.
    graph.replay()
    t.deepEqual(
      valueOf('x.flatten().tolist()', { x: output }),
      validResult().map((x) => 2 * x),
    )
    graph.dispose()
  })

  test('torch may not allocate in what is captured on its stream', (t) => {
    const x = evaluate('torch.ones(1000, device="cuda")')
    using context = torch.get('cuda').method('stream', torch.get('cuda').method('Stream'))
    context.method('__enter__').dispose()
    try {
      const stream = Stream.torchCurrent(device)
      const error = t.throws(() => Graph.capture(stream, () => x.method('mul', 2).dispose()), {
        instanceOf: EpmoeError,
      })
      t.is(error?.code, 'ERR_CAPTURE')
      t.regex(error?.received ?? '', /^1 allocations/)
      using graph = Graph.capture(stream, () => x.method('mul_', 2).dispose())
      graph.replay()
      t.is(valueOf('x.sum().item()', { x }), 2000)
    } finally {
      context.method('__exit__', null, null, null).dispose()
    }
  })

  test('work that torch captures cannot wait for a stream that is not captured, and says so', async (t) => {
    using busy = Stream.create(device)
    const { zeros, slow } = overtakable(device)
    const sums = zeros()
    const [T = 0, H = 0] = sums.shape
    const output = evaluate(`torch.empty(${T}, ${H}, dtype=torch.bfloat16, device="cuda")`)
    const one = evaluate(`torch.arange(${T}, device="cuda")`)
    const unit = evaluate(`torch.ones(${T}, 1, device="cuda")`)
    const occupy = () => {
      for (let i = 0; i < 50; i++) slow(sums, busy)
    }
    const capture = (begin: () => void): unknown => {
      using graph = torch.get('cuda').method('CUDAGraph')
      using context = torch.get('cuda').method('graph', graph)
      context.method('__enter__').dispose() // waits for the device
      try {
        begin()
        return codeOf(() => postReorder({ downOutput: sums, output, src2dst: one, topkWeights: unit }))
      } finally {
        context.method('__exit__', null, null, null).dispose()
      }
    }
    t.is(capture(occupy), 'ERR_CAPTURE')
    await busy.synchronize()
    t.is(
      capture(() => {}),
      'no error',
    )
  })
}
